// service-name: starts it, and ends it when it is told to.
import { once } from "node:events";

import { info } from "./log.js";
import { createService } from "./service.js";

const port = Number(process.env.PORT ?? 8080);
const service = createService({ message: process.env.MESSAGE, nextUrl: process.env.NEXT_URL });

service.server.listen(port, "0.0.0.0");
await once(service.server, "listening");
info("listening on port " + port);

for (const signal of ["SIGTERM", "SIGINT"]) {
  process.once(signal, async () => {
    info("shutting down");
    await service.close();
    info("stopped");
  });
}

// Sends lines with winston-loki, in both of its formats, and with @myunisoft/loki, and reads them with the latter. Each result is a line of JSON.
import { GrafanaApi } from "@myunisoft/loki";
import winston from "winston";
import LokiTransport from "winston-loki";

const url = process.env.LOKI;
const show = (what, result) => console.log(JSON.stringify({ what, result }));

for (const json of [true, false]) {
  const transport = new LokiTransport({
    host: url, json, batching: true, interval: 1, labels: { app: "winston", format: json ? "json" : "protobuf" },
    format: winston.format.json(), replaceTimestamp: true, onConnectionError: (err) => { throw err; },
  });
  const logger = winston.createLogger({ level: "debug", transports: [transport] });
  for (let n = 0; n < 5; n++) logger.info(`order ${n} "shipped"`, { labels: { part: "a" } });
  logger.error("order 5 lost ✗", { labels: { part: "b" } });
  await transport.flush();
  logger.close();
}

const api = new GrafanaApi({ remoteApiURL: url, authentication: { type: "classic", username: "any", password: "body" } });
const now = Date.now();
await api.Loki.push([{ stream: { app: "myunisoft" }, values: [1, 2, 3].map((n) => [String((now - n) * 1e6), `GET /order/${n}`]) }]);

show("labels", await api.Loki.labels());
show("values", await api.Loki.labelValues("app"));
show("series", await api.Loki.series({ app: "winston" }));
show("json", (await api.Loki.queryRange('{app="winston", format="json"} |= "order"', { start: "1h" })).logs.length);
show("protobuf", (await api.Loki.queryRange('{app="winston", format="protobuf"} | json | message=~"order.*"', { start: "1h" })).logs.length);
show("pattern", (await api.Loki.queryRange('{app="myunisoft"}', { start: "1h", pattern: "<verb> /order/<number>" })).logs);
show("streams", (await api.Loki.queryRangeStream('{app="myunisoft"}', { start: "1h", limit: 2 })).streams);
show("matrix", (await api.Loki.queryRangeMatrix('sum by (part) (count_over_time({app="winston"}[1h]))', { start: "10s", step: "10s" })).metrics.map(
  ({ labels, values }) => ({ labels, last: values.at(-1)[1] })));

package dev.polymesh.orders;

import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.node.ArrayNode;
import com.fasterxml.jackson.databind.node.ObjectNode;
import io.opentelemetry.api.trace.propagation.W3CTraceContextPropagator;
import io.opentelemetry.context.Context;
import jakarta.servlet.http.HttpServletRequest;
import java.io.IOException;
import java.math.BigDecimal;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.time.Duration;
import java.util.List;
import java.util.Map;
import org.springframework.beans.factory.annotation.Value;
import org.springframework.http.ResponseEntity;
import org.springframework.web.bind.annotation.GetMapping;
import org.springframework.web.bind.annotation.RestController;

/** What the services of all languages answer: the probes, and the chain, in which each asks the next one. */
@RestController
class Service {
    static final String NAME = "java-service";
    private static final Order EXAMPLE = new Order(null, "chain",
            List.of(new Order.Line("book", 2, new BigDecimal("19.99")), new Order.Line("pen", 3, new BigDecimal("1.50"))));

    private final ObjectMapper json;
    private final String nextUrl;
    private final HttpClient client = HttpClient.newBuilder()
            .version(HttpClient.Version.HTTP_1_1) // the sidecar would refuse to change the protocol
            .connectTimeout(Duration.ofSeconds(5))
            .build();

    Service(ObjectMapper json, @Value("${chain.next-url}") String nextUrl) {
        this.json = json;
        this.nextUrl = nextUrl;
    }

    @GetMapping("/health")
    Map<String, String> health() {
        return Map.of("status", "healthy");
    }

    @GetMapping("/ready")
    Map<String, String> ready() {
        return Map.of("status", "ready");
    }

    @GetMapping("/api/v1/chain")
    ResponseEntity<JsonNode> chain(HttpServletRequest request) throws InterruptedException {
        ObjectNode answer = json.createObjectNode();
        ArrayNode links = answer.putArray("chain");
        links.addObject()
                .put("service", NAME)
                .put("language", "Java")
                .put("work", "an order of " + EXAMPLE.total())
                .put("trace_id", Trace.of(request::getHeader).id());
        if (!nextUrl.isEmpty()) {
            try {
                next(request).forEach(links::add);
            } catch (IOException problem) {
                return ResponseEntity.status(502)
                        .body(json.createObjectNode().put("error", NAME + " calls " + nextUrl + ": " + problem));
            }
        }
        return ResponseEntity.ok(answer);
    }

    private JsonNode next(HttpServletRequest request) throws IOException, InterruptedException {
        HttpRequest.Builder call = HttpRequest.newBuilder(URI.create(nextUrl + "/api/v1/chain")).timeout(Duration.ofSeconds(11));
        for (String name : Trace.PASSED_ON) {
            String value = request.getHeader(name);
            if (value != null) {
                call.header(name, value);
            }
        }
        // The app's own span, where it has one, is the parent of the call's.
        W3CTraceContextPropagator.getInstance().inject(Context.current(), call, HttpRequest.Builder::setHeader);
        HttpResponse<String> response = client.send(call.build(), HttpResponse.BodyHandlers.ofString());
        if (response.statusCode() != 200) {
            throw new IOException(response.statusCode() + " " + response.body());
        }
        return json.readTree(response.body()).path("chain");
    }
}

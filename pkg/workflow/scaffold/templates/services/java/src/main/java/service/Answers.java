package service;

import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.node.ObjectNode;
import jakarta.servlet.http.HttpServletRequest;
import java.io.IOException;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.time.Duration;
import java.util.Map;
import org.springframework.beans.factory.annotation.Value;
import org.springframework.http.ResponseEntity;
import org.springframework.web.bind.annotation.GetMapping;
import org.springframework.web.bind.annotation.RestController;

/** What the service answers. It asks another one for each request where it is told of one. */
@RestController
class Answers {
    static final String SERVICE = "service-name";
    private static final Duration CALL_TIMEOUT = Duration.ofSeconds(10);

    private final ObjectMapper json;
    private final String message;
    private final String nextUrl;
    private final HttpClient client = HttpClient.newBuilder()
            .version(HttpClient.Version.HTTP_1_1) // the sidecar would refuse to change the protocol
            .connectTimeout(CALL_TIMEOUT)
            .build();

    Answers(ObjectMapper json, @Value("${service.message}") String message, @Value("${service.next-url}") String nextUrl) {
        this.json = json;
        this.message = message;
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

    @GetMapping("/service-name")
    ResponseEntity<JsonNode> answer(HttpServletRequest request) throws InterruptedException {
        ObjectNode body = json.createObjectNode().put("service", SERVICE).put("message", message);
        if (!nextUrl.isEmpty()) {
            try {
                body.set("next", ask(nextUrl, request));
            } catch (IOException problem) {
                return ResponseEntity.status(502)
                        .body(json.createObjectNode().put("error", SERVICE + " asks " + nextUrl + ": " + problem));
            }
        }
        return ResponseEntity.ok(body);
    }

    /** Asks the next service on behalf of a request. */
    private JsonNode ask(String url, HttpServletRequest request) throws IOException, InterruptedException {
        HttpRequest.Builder call = HttpRequest.newBuilder(URI.create(url)).timeout(CALL_TIMEOUT);
        for (String name : Trace.PASSED_ON) {
            String value = request.getHeader(name);
            if (value != null) {
                call.header(name, value);
            }
        }
        HttpResponse<String> response = client.send(call.build(), HttpResponse.BodyHandlers.ofString());
        if (response.statusCode() != 200) {
            throw new IOException(response.statusCode() + " " + response.body());
        }
        return json.readTree(response.body());
    }
}

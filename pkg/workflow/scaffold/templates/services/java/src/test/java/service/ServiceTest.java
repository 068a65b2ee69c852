package service;

import static org.assertj.core.api.Assertions.assertThat;

import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import com.sun.net.httpserver.Headers;
import com.sun.net.httpserver.HttpServer;
import java.io.IOException;
import java.net.InetSocketAddress;
import java.nio.charset.StandardCharsets;
import java.util.Map;
import org.junit.jupiter.api.AfterAll;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.extension.ExtendWith;
import org.springframework.beans.factory.annotation.Autowired;
import org.springframework.boot.test.autoconfigure.actuate.observability.AutoConfigureObservability;
import org.springframework.boot.test.context.SpringBootTest;
import org.springframework.boot.test.system.CapturedOutput;
import org.springframework.boot.test.system.OutputCaptureExtension;
import org.springframework.boot.test.web.client.TestRestTemplate;
import org.springframework.http.HttpEntity;
import org.springframework.http.HttpHeaders;
import org.springframework.http.HttpMethod;
import org.springframework.http.ResponseEntity;
import org.springframework.test.context.DynamicPropertyRegistry;
import org.springframework.test.context.DynamicPropertySource;

/** The service as it runs, with another one that it asks. */
@SpringBootTest(webEnvironment = SpringBootTest.WebEnvironment.RANDOM_PORT, properties = "service.message=good day")
@AutoConfigureObservability // tests have no metrics otherwise
@ExtendWith(OutputCaptureExtension.class)
class ServiceTest {
    private static HttpServer next;
    private static volatile Headers seen;
    private static volatile int status;

    @Autowired TestRestTemplate http;

    @DynamicPropertySource
    static void startNext(DynamicPropertyRegistry properties) throws IOException {
        next = HttpServer.create(new InetSocketAddress("127.0.0.1", 0), 0);
        next.createContext("/next", exchange -> {
            seen = exchange.getRequestHeaders();
            byte[] body = "{\"service\":\"next\"}".getBytes(StandardCharsets.UTF_8);
            exchange.sendResponseHeaders(status, body.length);
            exchange.getResponseBody().write(body);
            exchange.close();
        });
        next.start();
        properties.add("service.next-url", () -> "http://127.0.0.1:" + next.getAddress().getPort() + "/next");
    }

    @BeforeEach
    void nextAnswers() {
        status = 200;
    }

    @AfterAll
    static void stopNext() {
        next.stop(0);
    }

    private ResponseEntity<String> get(String path, HttpHeaders headers) {
        return http.exchange(path, HttpMethod.GET, new HttpEntity<>(null, headers), String.class);
    }

    private ResponseEntity<String> get(String path) {
        return get(path, new HttpHeaders());
    }

    @Test
    void probes() {
        assertThat(get("/health").getBody()).isEqualTo("{\"status\":\"healthy\"}");
        assertThat(get("/ready").getBody()).isEqualTo("{\"status\":\"ready\"}");
        assertThat(get("/nowhere").getStatusCode().value()).isEqualTo(404);
    }

    @Test
    void passesTheTraceOn() {
        HttpHeaders headers = new HttpHeaders();
        Trace.PASSED_ON.forEach(name -> headers.set(name, "of-" + name));
        headers.set("cookie", "a=secret");
        assertThat(get("/service-name", headers).getBody())
                .isEqualTo("{\"service\":\"service-name\",\"message\":\"good day\",\"next\":{\"service\":\"next\"}}");
        Trace.PASSED_ON.forEach(name -> assertThat(seen.getFirst(name)).as(name).isEqualTo(headers.getFirst(name)));
        assertThat(seen.getFirst("cookie")).isNull();
    }

    @Test
    void broken() {
        status = 503;
        ResponseEntity<String> answer = get("/service-name");
        assertThat(answer.getStatusCode().value()).isEqualTo(502);
        assertThat(answer.getBody()).contains("503");
    }

    @Test
    void traceOfHeaders() {
        assertThat(Trace.of(Map.of("traceparent", "00-aa-bb-01", "x-b3-traceid", "cc")::get)).isEqualTo(new Trace("aa", "bb"));
        assertThat(Trace.of(Map.of("x-b3-traceid", "cc", "x-b3-spanid", "dd")::get)).isEqualTo(new Trace("cc", "dd"));
        assertThat(Trace.of(Map.of("traceparent", "nonsense")::get)).isEqualTo(new Trace("", ""));
    }

    @Test
    void logsAndCounts(CapturedOutput output) throws IOException {
        HttpHeaders headers = new HttpHeaders();
        headers.set("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
        headers.set("x-request-id", "r");
        get("/service-name", headers);
        get("/health");
        String metrics = get("/metrics").getBody();
        assertThat(metrics).containsPattern("http_requests_total\\{method=\"GET\",path=\"/service-name\",status=\"200\"} ");
        assertThat(metrics).contains("http_request_duration_seconds_count{method=\"GET\",path=\"/service-name\"}");
        String line = output.getOut().lines().filter(text -> text.contains("\"message\":\"request\"")).reduce((first, last) -> last).orElseThrow();
        JsonNode fields = new ObjectMapper().readTree(line);
        assertThat(fields.get("service").asText()).isEqualTo("service-name");
        assertThat(fields.get("level").asText()).isEqualTo("info");
        assertThat(fields.get("path").asText()).isEqualTo("/service-name");
        assertThat(fields.get("status").asInt()).isEqualTo(200);
        assertThat(fields.get("trace_id").asText()).isEqualTo("4bf92f3577b34da6a3ce929d0e0e4736");
        assertThat(fields.get("span_id").asText()).isEqualTo("00f067aa0ba902b7");
        assertThat(fields.get("request_id").asText()).isEqualTo("r");
    }
}

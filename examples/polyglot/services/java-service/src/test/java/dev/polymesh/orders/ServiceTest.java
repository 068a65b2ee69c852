package dev.polymesh.orders;

import static org.assertj.core.api.Assertions.assertThat;
import static org.awaitility.Awaitility.await;

import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import com.sun.net.httpserver.Headers;
import com.sun.net.httpserver.HttpServer;
import io.opentelemetry.sdk.testing.exporter.InMemorySpanExporter;
import io.opentelemetry.sdk.trace.SpanProcessor;
import io.opentelemetry.sdk.trace.data.SpanData;
import io.opentelemetry.sdk.trace.export.SimpleSpanProcessor;
import java.io.IOException;
import java.net.InetSocketAddress;
import java.nio.charset.StandardCharsets;
import org.junit.jupiter.api.AfterAll;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.extension.ExtendWith;
import org.springframework.beans.factory.annotation.Autowired;
import org.springframework.boot.test.context.SpringBootTest;
import org.springframework.boot.test.context.TestConfiguration;
import org.springframework.boot.test.system.CapturedOutput;
import org.springframework.boot.test.system.OutputCaptureExtension;
import org.springframework.boot.test.web.client.TestRestTemplate;
import org.springframework.boot.test.autoconfigure.actuate.observability.AutoConfigureObservability;
import org.springframework.context.annotation.Bean;
import org.springframework.http.HttpEntity;
import org.springframework.http.HttpHeaders;
import org.springframework.http.HttpMethod;
import org.springframework.http.MediaType;
import org.springframework.http.ResponseEntity;
import org.springframework.test.context.DynamicPropertyRegistry;
import org.springframework.test.context.DynamicPropertySource;

/** The service as it runs, without a database. */
@SpringBootTest(webEnvironment = SpringBootTest.WebEnvironment.RANDOM_PORT)
@AutoConfigureObservability // tests have no metrics otherwise
@ExtendWith(OutputCaptureExtension.class)
class ServiceTest {
    private static final String TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    private static final InMemorySpanExporter SPANS = InMemorySpanExporter.create();
    private static HttpServer next; // of the chain
    private static volatile Headers seen;
    private static volatile int status;

    @Autowired TestRestTemplate http;

    @DynamicPropertySource
    static void startNext(DynamicPropertyRegistry properties) throws IOException {
        next = HttpServer.create(new InetSocketAddress("127.0.0.1", 0), 0);
        next.createContext("/api/v1/chain", exchange -> {
            seen = exchange.getRequestHeaders();
            byte[] body = "{\"chain\":[{\"service\":\"next\"}]}".getBytes(StandardCharsets.UTF_8);
            exchange.sendResponseHeaders(status, body.length);
            exchange.getResponseBody().write(body);
            exchange.close();
        });
        next.start();
        properties.add("NEXT_URL", () -> "http://127.0.0.1:" + next.getAddress().getPort());
    }

    @TestConfiguration
    static class Collector {
        @Bean
        SpanProcessor spanProcessor() {
            return SimpleSpanProcessor.create(SPANS);
        }
    }

    @BeforeEach
    void nextAnswers() {
        status = 200;
    }

    @AfterAll
    static void stopNext() {
        next.stop(0);
    }

    private ResponseEntity<String> call(HttpMethod method, String path, HttpHeaders headers, String body) {
        return http.exchange(path, method, new HttpEntity<>(body, headers), String.class);
    }

    private ResponseEntity<String> get(String path) {
        return call(HttpMethod.GET, path, new HttpHeaders(), null);
    }

    @Test
    void probes() {
        assertThat(get("/health").getBody()).isEqualTo("{\"status\":\"healthy\"}");
        assertThat(get("/ready").getBody()).isEqualTo("{\"status\":\"ready\"}");
        assertThat(get("/nowhere").getStatusCode().value()).isEqualTo(404);
    }

    @Test
    void chainPassesTheTraceOn() throws IOException {
        HttpHeaders headers = new HttpHeaders();
        Trace.PASSED_ON.forEach(name -> headers.set(name, "of-" + name));
        headers.set("traceparent", TRACEPARENT);
        headers.set("cookie", "a=secret");
        JsonNode links = new ObjectMapper().readTree(call(HttpMethod.GET, "/api/v1/chain", headers, null).getBody()).get("chain");
        assertThat(links).hasSize(2);
        assertThat(links.get(0).toString()).isEqualTo("{\"service\":\"java-service\",\"language\":\"Java\",\"work\":\"an order of 44.48\","
                + "\"trace_id\":\"4bf92f3577b34da6a3ce929d0e0e4736\"}");
        assertThat(links.get(1).get("service").asText()).isEqualTo("next");
        Trace.PASSED_ON.stream().filter(name -> !name.equals("traceparent"))
                .forEach(name -> assertThat(seen.getFirst(name)).as(name).isEqualTo(headers.getFirst(name)));
        assertThat(seen.getFirst("cookie")).isNull();
    }

    /** The app's span stands between the one that the sidecar sent and the one of the call. */
    @Test
    void span() {
        SPANS.reset();
        HttpHeaders headers = new HttpHeaders();
        call(HttpMethod.GET, "/api/v1/chain", headers, null);
        headers.set("traceparent", TRACEPARENT.replaceFirst("1$", "0"));
        call(HttpMethod.GET, "/api/v1/chain", headers, null);
        headers.set("traceparent", TRACEPARENT);
        call(HttpMethod.GET, "/api/v1/chain", headers, null);
        await().until(() -> SPANS.getFinishedSpanItems().size() == 1);
        SpanData span = SPANS.getFinishedSpanItems().get(0);
        assertThat(span.getName()).isEqualTo("GET /api/v1/chain");
        assertThat(span.getParentSpanId()).isEqualTo("00f067aa0ba902b7");
        assertThat(seen.getFirst("traceparent")).isEqualTo("00-4bf92f3577b34da6a3ce929d0e0e4736-" + span.getSpanId() + "-01");
    }

    @Test
    void brokenChain() {
        status = 503;
        ResponseEntity<String> answer = get("/api/v1/chain");
        assertThat(answer.getStatusCode().value()).isEqualTo(502);
        assertThat(answer.getBody()).contains("503");
    }

    @Test
    void ordersNeedADatabase() {
        HttpHeaders headers = new HttpHeaders();
        headers.setContentType(MediaType.APPLICATION_JSON);
        String order = "{\"customer\":\"a\",\"lines\":[{\"product\":\"book\",\"quantity\":1,\"price\":1.50}]}";
        ResponseEntity<String> answer = call(HttpMethod.POST, "/api/v1/orders", headers, order);
        assertThat(answer.getStatusCode().value()).isEqualTo(503);
        assertThat(answer.getBody()).contains("ORDERS_DATABASE_URL is not set");
        assertThat(get("/api/v1/orders/1").getStatusCode().value()).isEqualTo(503);
        assertThat(call(HttpMethod.POST, "/api/v1/orders", headers, "{\"customer\":\"a\"}").getStatusCode().value()).isEqualTo(400);
    }

    @Test
    void logsAndCounts(CapturedOutput output) throws IOException {
        HttpHeaders headers = new HttpHeaders();
        headers.set("traceparent", TRACEPARENT);
        headers.set("x-request-id", "r");
        call(HttpMethod.GET, "/api/v1/orders/7", headers, null);
        get("/health");
        String metrics = get("/metrics").getBody();
        assertThat(metrics).containsPattern("http_requests_total\\{method=\"GET\",path=\"/api/v1/orders/\\{id}\",status=\"503\"} ");
        assertThat(metrics).contains("http_request_duration_seconds_count{method=\"GET\",path=\"/api/v1/orders/{id}\"}");
        String line = output.getOut().lines().filter(text -> text.contains("\"message\":\"request\"")).reduce((first, last) -> last).orElseThrow();
        JsonNode fields = new ObjectMapper().readTree(line);
        assertThat(fields.get("service").asText()).isEqualTo("java-service");
        assertThat(fields.get("level").asText()).isEqualTo("info");
        assertThat(fields.get("path").asText()).isEqualTo("/api/v1/orders/{id}");
        assertThat(fields.get("status").asInt()).isEqualTo(503);
        assertThat(fields.get("trace_id").asText()).isEqualTo("4bf92f3577b34da6a3ce929d0e0e4736");
        assertThat(fields.get("span_id").asText()).isEqualTo("00f067aa0ba902b7");
        assertThat(fields.get("request_id").asText()).isEqualTo("r");
    }
}

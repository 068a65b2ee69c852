package service;

import io.micrometer.core.instrument.MeterRegistry;
import io.micrometer.core.instrument.Timer;
import jakarta.servlet.FilterChain;
import jakarta.servlet.ServletException;
import jakarta.servlet.http.HttpServletRequest;
import jakarta.servlet.http.HttpServletResponse;
import java.io.IOException;
import java.time.Duration;
import java.util.Set;
import org.slf4j.Logger;
import org.slf4j.LoggerFactory;
import org.slf4j.MDC;
import org.springframework.core.Ordered;
import org.springframework.core.annotation.Order;
import org.springframework.stereotype.Component;
import org.springframework.web.filter.OncePerRequestFilter;
import org.springframework.web.servlet.HandlerMapping;

/** Counts and logs each request, and gives every line that is logged for it the trace's id. */
@Component
@Order(Ordered.HIGHEST_PRECEDENCE)
class RequestLog extends OncePerRequestFilter {
    // What asks for these are machines, every few seconds: neither logged nor counted.
    private static final Set<String> QUIET = Set.of("/health", "/ready", "/metrics");
    private static final Logger LOG = LoggerFactory.getLogger(RequestLog.class);

    private final MeterRegistry metrics;

    RequestLog(MeterRegistry metrics) {
        this.metrics = metrics;
    }

    @Override
    protected boolean shouldNotFilter(HttpServletRequest request) {
        return QUIET.contains(request.getRequestURI());
    }

    @Override
    protected void doFilterInternal(HttpServletRequest request, HttpServletResponse response, FilterChain chain)
            throws ServletException, IOException {
        long start = System.nanoTime();
        Trace trace = Trace.of(request::getHeader);
        String requestId = request.getHeader("x-request-id");
        MDC.put("trace_id", trace.id());
        MDC.put("span_id", trace.span());
        MDC.put("request_id", requestId == null ? "" : requestId);
        try {
            chain.doFilter(request, response);
        } finally {
            Duration took = Duration.ofNanos(System.nanoTime() - start);
            // The path of the handler: what clients make up would be metrics without end.
            Object pattern = request.getAttribute(HandlerMapping.BEST_MATCHING_PATTERN_ATTRIBUTE);
            String path = pattern == null || pattern.equals("/**") ? "" : pattern.toString();
            String status = Integer.toString(response.getStatus());
            metrics.counter("http_requests", "method", request.getMethod(), "path", path, "status", status).increment();
            Timer.builder("http_request_duration")
                    .tags("method", request.getMethod(), "path", path)
                    .publishPercentileHistogram()
                    .register(metrics)
                    .record(took);
            LOG.atInfo()
                    .addKeyValue("method", request.getMethod())
                    .addKeyValue("path", path)
                    .addKeyValue("status", response.getStatus())
                    .addKeyValue("duration_ms", took.toNanos() / 1000 / 1000.0)
                    .log("request");
            MDC.clear();
        }
    }
}

package dev.polymesh.orders;

import io.opentelemetry.api.common.AttributeKey;
import io.opentelemetry.api.common.Attributes;
import io.opentelemetry.api.trace.Span;
import io.opentelemetry.api.trace.SpanKind;
import io.opentelemetry.api.trace.StatusCode;
import io.opentelemetry.api.trace.propagation.W3CTraceContextPropagator;
import io.opentelemetry.context.Context;
import io.opentelemetry.context.propagation.TextMapGetter;
import io.opentelemetry.exporter.otlp.http.trace.OtlpHttpSpanExporter;
import io.opentelemetry.sdk.resources.Resource;
import io.opentelemetry.sdk.trace.SdkTracerProvider;
import io.opentelemetry.sdk.trace.SdkTracerProviderBuilder;
import io.opentelemetry.sdk.trace.SpanProcessor;
import io.opentelemetry.sdk.trace.export.BatchSpanProcessor;
import io.opentelemetry.sdk.trace.samplers.Sampler;
import jakarta.servlet.http.HttpServletRequest;
import java.util.Collections;
import java.util.Optional;
import org.springframework.beans.factory.DisposableBean;
import org.springframework.boot.autoconfigure.condition.ConditionalOnProperty;
import org.springframework.context.annotation.Bean;
import org.springframework.context.annotation.Configuration;
import org.springframework.core.env.Environment;
import org.springframework.stereotype.Component;

/** The app's own part in requests that the mesh traces: a span between the sidecar's and those of the calls. */
@Component
class Tracing implements DisposableBean {
    private static final AttributeKey<String> METHOD = AttributeKey.stringKey("http.request.method");
    private static final AttributeKey<String> ROUTE = AttributeKey.stringKey("http.route");
    private static final AttributeKey<Long> STATUS = AttributeKey.longKey("http.response.status_code");
    private static final TextMapGetter<HttpServletRequest> HEADERS = new TextMapGetter<>() {
        @Override
        public Iterable<String> keys(HttpServletRequest request) {
            return Collections.list(request.getHeaderNames());
        }

        @Override
        public String get(HttpServletRequest request, String name) {
            return request.getHeader(name);
        }
    };

    private final SdkTracerProvider provider;

    /** Without a processor there are no spans of the app. */
    Tracing(Optional<SpanProcessor> processor) {
        SdkTracerProviderBuilder builder = SdkTracerProvider.builder()
                .setSampler(Sampler.parentBased(Sampler.alwaysOff())) // the mesh decides what is traced
                .setResource(Resource.create(Attributes.of(AttributeKey.stringKey("service.name"), Service.NAME)));
        processor.ifPresent(builder::addSpanProcessor);
        provider = processor.isPresent() ? builder.build() : null;
    }

    @Configuration
    static class Collector {
        /** Sends spans to the collector. */
        @Bean(destroyMethod = "") // Tracing shuts it down
        @ConditionalOnProperty("OTEL_EXPORTER_OTLP_ENDPOINT")
        SpanProcessor spanProcessor(Environment environment) {
            String endpoint = environment.getRequiredProperty("OTEL_EXPORTER_OTLP_ENDPOINT");
            return BatchSpanProcessor.builder(OtlpHttpSpanExporter.builder().setEndpoint(endpoint + "/v1/traces").build()).build();
        }
    }

    /** The span of a request, with the sidecar's as its parent. A request without W3C's header has none. */
    Span start(HttpServletRequest request) {
        Context parent = W3CTraceContextPropagator.getInstance().extract(Context.root(), request, HEADERS);
        if (provider == null || !Span.fromContext(parent).getSpanContext().isValid()) {
            return Span.getInvalid();
        }
        return provider.get(Service.NAME).spanBuilder(request.getMethod()).setSpanKind(SpanKind.SERVER).setParent(parent).startSpan();
    }

    static void end(Span span, String method, String path, int status) {
        span.updateName(method + " " + path);
        span.setAttribute(METHOD, method).setAttribute(ROUTE, path).setAttribute(STATUS, (long) status);
        if (status >= 500) {
            span.setStatus(StatusCode.ERROR);
        }
        span.end();
    }

    /** Sends what is still here. */
    @Override
    public void destroy() {
        if (provider != null) {
            provider.close();
        }
    }
}

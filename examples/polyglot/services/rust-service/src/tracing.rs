//! The app's own part in requests that the mesh traces: a span whose parent is the sidecar's.

use std::env;

use axum::http::HeaderMap;
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{Span, SpanKind, Status, TraceContextExt, Tracer, TracerProvider};
use opentelemetry::{Context, KeyValue};
use opentelemetry_http::HeaderExtractor;
use opentelemetry_otlp::{ExporterBuildError, SpanExporter};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SdkTracer, SdkTracerProvider, TracerProviderBuilder};

use crate::log::SERVICE;

/// Sends spans to the collector at OTEL_EXPORTER_OTLP_ENDPOINT; without one there are no spans of the app. To be called
/// outside of the runtime: the exporter has a thread of its own.
pub fn provider() -> Result<Option<SdkTracerProvider>, ExporterBuildError> {
    if env::var("OTEL_EXPORTER_OTLP_ENDPOINT").unwrap_or_default().is_empty() {
        return Ok(None);
    }
    let exporter = SpanExporter::builder().with_http().build()?;
    Ok(Some(builder().with_batch_exporter(exporter).build()))
}

fn builder() -> TracerProviderBuilder {
    SdkTracerProvider::builder()
        // The mesh decides what is traced.
        .with_sampler(Sampler::ParentBased(Box::new(Sampler::AlwaysOff)))
        .with_resource(Resource::builder_empty().with_service_name(SERVICE).build())
}

/// Makes the spans.
pub struct Tracing(Option<SdkTracer>);

impl Tracing {
    pub fn new(provider: Option<&SdkTracerProvider>) -> Tracing {
        Tracing(provider.map(|provider| provider.tracer(SERVICE)))
    }

    /// The span of a request. One without W3C's header has none.
    pub fn start(&self, method: &str, path: &str, headers: &HeaderMap) -> Option<impl Span + use<>> {
        let tracer = self.0.as_ref()?;
        let parent = TraceContextPropagator::new().extract_with_context(&Context::new(), &HeaderExtractor(headers));
        if !parent.has_active_span() {
            return None;
        }
        let span = tracer.span_builder(format!("{method} {path}")).with_kind(SpanKind::Server).with_attributes([
            KeyValue::new("http.request.method", method.to_string()),
            KeyValue::new("http.route", path.to_string()),
        ]);
        Some(span.start_with_context(tracer, &parent))
    }
}

pub fn end(span: Option<impl Span>, status: u16) {
    let Some(mut span) = span else { return };
    span.set_attribute(KeyValue::new("http.response.status_code", i64::from(status)));
    if status >= 500 {
        span.set_status(Status::error(""));
    }
    span.end();
}

#[cfg(test)]
mod tests {
    use opentelemetry_sdk::trace::InMemorySpanExporter;

    use super::*;

    #[test]
    fn span_under_the_sidecars() {
        let spans = InMemorySpanExporter::default();
        let provider = builder().with_simple_exporter(spans.clone()).build();
        let tracing = Tracing::new(Some(&provider));
        let finish = |traceparent: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("traceparent", traceparent.parse().unwrap());
            end(tracing.start("GET", "/api/v1/chain", &headers), 200);
            spans.get_finished_spans().unwrap()
        };
        assert!(finish("").is_empty());
        assert!(finish("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00").is_empty());
        let found = finish("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].name, "GET /api/v1/chain");
        assert_eq!(found[0].parent_span_id.to_string(), "00f067aa0ba902b7");
        assert_eq!(found[0].span_context.trace_id().to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
    }
}

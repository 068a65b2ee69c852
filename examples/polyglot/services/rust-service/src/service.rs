//! What the service answers.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{MatchedPath, Query, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::log::{self, Trace};
use crate::metrics::Metrics;
use crate::primes;
use crate::tracing::{self, Tracing};

/// What the chain has counted.
const CHAIN_BELOW: usize = 100_000;

/// What counts and traces requests.
pub struct Observer {
    pub metrics: Metrics,
    pub tracing: Tracing,
}

pub fn router(observer: Arc<Observer>) -> Router {
    Router::new()
        .route("/api/v1/primes", get(count_primes))
        .route("/api/v1/chain", get(chain))
        .layer(middleware::from_fn_with_state(observer.clone(), observe))
        // What asks for these are machines, every few seconds: neither logged nor counted.
        .route("/health", get(|| async { Json(json!({"status": "healthy"})) }))
        .route("/ready", get(|| async { Json(json!({"status": "ready"})) }))
        .route("/metrics", get(scrape))
        .with_state(observer)
}

#[derive(Deserialize)]
struct Range {
    below: usize,
}

async fn count_primes(Query(range): Query<Range>) -> Result<Json<Value>, Failure> {
    if range.below > primes::LIMIT {
        return Err(Failure(StatusCode::BAD_REQUEST, format!("below is at most {}", primes::LIMIT)));
    }
    Ok(Json(json!({"below": range.below, "primes": count(range.below).await?})))
}

async fn chain(headers: HeaderMap) -> Result<Json<Value>, Failure> {
    let primes = count(CHAIN_BELOW).await?;
    Ok(Json(json!({"chain": [{
        "service": log::SERVICE,
        "language": "Rust",
        "work": format!("{primes} primes below {CHAIN_BELOW}"),
        "trace_id": Trace::of(&headers).id,
    }]})))
}

/// Counting keeps a thread busy, so it has one that answers nobody else.
async fn count(below: usize) -> Result<usize, Failure> {
    tokio::task::spawn_blocking(move || primes::count(below))
        .await
        .map_err(|error| Failure(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))
}

async fn scrape(State(observer): State<Arc<Observer>>) -> Result<Response, Failure> {
    let (format, text) = observer
        .metrics
        .text()
        .map_err(|error| Failure(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
    Ok(([(header::CONTENT_TYPE, format)], text).into_response())
}

async fn observe(State(observer): State<Arc<Observer>>, request: Request, next: Next) -> Response {
    let start = Instant::now();
    let method = request.method().to_string();
    let path = request.extensions().get::<MatchedPath>().map_or("", MatchedPath::as_str).to_string();
    let headers = request.headers().clone();
    let span = observer.tracing.start(&method, &path, &headers);
    let response = next.run(request).await;
    let (status, took) = (response.status().as_u16(), start.elapsed());
    tracing::end(span, status);
    observer.metrics.observe(&method, &path, status, took);
    log::request(&method, &path, status, took, &headers);
    response
}

struct Failure(StatusCode, String);

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.0, Json(json!({"error": self.1}))).into_response()
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use http_body_util::BodyExt;
    use tower::ServiceExt;

    use super::*;

    async fn get(router: &Router, path: &str) -> (StatusCode, String) {
        let request = Request::builder()
            .uri(path)
            .header("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
            .body(Body::empty())
            .unwrap();
        let response = router.clone().oneshot(request).await.unwrap();
        let status = response.status();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    fn run(test: impl Future<Output = ()>) {
        tokio::runtime::Runtime::new().unwrap().block_on(test);
    }

    fn new() -> Router {
        router(Arc::new(Observer { metrics: Metrics::new().unwrap(), tracing: Tracing::new(None) }))
    }

    #[test]
    fn answers() {
        run(async {
            let router = new();
            assert_eq!(get(&router, "/health").await, (StatusCode::OK, r#"{"status":"healthy"}"#.to_string()));
            assert_eq!(get(&router, "/ready").await, (StatusCode::OK, r#"{"status":"ready"}"#.to_string()));
            assert_eq!(get(&router, "/api/v1/primes?below=100").await, (StatusCode::OK, r#"{"below":100,"primes":25}"#.to_string()));
            for path in ["/api/v1/primes", "/api/v1/primes?below=x", "/api/v1/primes?below=-1", "/api/v1/primes?below=10000001"] {
                assert_eq!(get(&router, path).await.0, StatusCode::BAD_REQUEST, "{path}");
            }
            assert_eq!(get(&router, "/nowhere").await.0, StatusCode::NOT_FOUND);
        });
    }

    #[test]
    fn end_of_the_chain() {
        run(async {
            let (status, body) = get(&new(), "/api/v1/chain").await;
            let answer: Value = serde_json::from_str(&body).unwrap();
            assert_eq!(status, StatusCode::OK);
            assert_eq!(answer, json!({"chain": [{
                "service": "rust-service", "language": "Rust", "work": "9592 primes below 100000",
                "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
            }]}));
        });
    }

    #[test]
    fn counts_requests() {
        run(async {
            let router = new();
            for _ in 0..3 {
                get(&router, "/api/v1/primes?below=10").await;
            }
            get(&router, "/api/v1/primes").await;
            let (status, text) = get(&router, "/metrics").await;
            assert_eq!(status, StatusCode::OK);
            for line in [
                r#"http_requests_total{method="GET",path="/api/v1/primes",status="200"} 3"#,
                r#"http_requests_total{method="GET",path="/api/v1/primes",status="400"} 1"#,
                r#"http_request_duration_seconds_count{method="GET",path="/api/v1/primes"} 4"#,
            ] {
                assert!(text.contains(line), "{line} is not in {text}");
            }
            assert!(!text.contains("/health"), "{text}");
        });
    }
}

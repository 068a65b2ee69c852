//! What the service answers.

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{MatchedPath, Request, State};
use axum::http::uri::InvalidUri;
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use http_body_util::{BodyExt, Empty};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};

use crate::log::{self, SERVICE};
use crate::metrics::Metrics;
use crate::trace;

const CALL_TIMEOUT: Duration = Duration::from_secs(10);

type Body = Empty<axum::body::Bytes>;

pub struct Service {
    message: String,
    /// Whom it asks for each request.
    next_url: Option<Uri>,
    client: Client<HttpConnector, Body>,
    metrics: Metrics,
}

impl Service {
    /// It asks nobody if next_url is empty.
    pub fn new(message: String, next_url: &str) -> Result<Service, Box<dyn Error>> {
        let next_url = (!next_url.is_empty())
            .then(|| next_url.parse())
            .transpose()
            .map_err(|error: InvalidUri| format!("NEXT_URL {next_url}: {error}"))?;
        // Encryption is the sidecar's work.
        let client = Client::builder(TokioExecutor::new()).build_http();
        Ok(Service { message, next_url, client, metrics: Metrics::new()? })
    }

    /// Asks the next service on behalf of a request.
    async fn ask(&self, url: &Uri, headers: &HeaderMap) -> Result<Value, Box<dyn Error + Send + Sync>> {
        let mut request = axum::http::Request::get(url).body(Body::new())?;
        *request.headers_mut() = trace::headers(headers);
        let response = self.client.request(request).await?;
        let status = response.status();
        let text = response.into_body().collect().await?.to_bytes();
        if status != StatusCode::OK {
            return Err(format!("{status}: {}", String::from_utf8_lossy(&text)).into());
        }
        Ok(serde_json::from_slice(&text)?)
    }
}

pub fn router(service: Arc<Service>) -> Router {
    Router::new()
        .route("/service-name", get(answer))
        .layer(middleware::from_fn_with_state(service.clone(), observe))
        // What asks for these are machines, every few seconds: neither logged nor counted.
        .route("/health", get(|| async { Json(json!({"status": "healthy"})) }))
        .route("/ready", get(|| async { Json(json!({"status": "ready"})) }))
        .route("/metrics", get(scrape))
        .with_state(service)
}

async fn answer(State(service): State<Arc<Service>>, headers: HeaderMap) -> Response {
    let mut body = json!({"service": SERVICE, "message": service.message});
    if let Some(url) = &service.next_url {
        let asked = tokio::time::timeout(CALL_TIMEOUT, service.ask(url, &headers)).await;
        match asked.unwrap_or_else(|_| Err("no answer in time".into())) {
            Ok(next) => body["next"] = next,
            Err(error) => return failure(StatusCode::BAD_GATEWAY, format!("{SERVICE} asks {url}: {error}")),
        }
    }
    Json(body).into_response()
}

async fn scrape(State(service): State<Arc<Service>>) -> Response {
    match service.metrics.text() {
        Ok((format, text)) => ([(header::CONTENT_TYPE, format)], text).into_response(),
        Err(error) => failure(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

fn failure(status: StatusCode, error: String) -> Response {
    (status, Json(json!({"error": error}))).into_response()
}

/// Counts and logs a request. The path is the route's: what clients make up would be metrics without end.
async fn observe(State(service): State<Arc<Service>>, request: Request, next: Next) -> Response {
    let start = Instant::now();
    let method = request.method().to_string();
    let path = request.extensions().get::<MatchedPath>().map_or("", MatchedPath::as_str).to_string();
    let headers = request.headers().clone();
    let response = next.run(request).await;
    let (status, took) = (response.status().as_u16(), start.elapsed());
    service.metrics.observe(&method, &path, status, took);
    log::request(&method, &path, status, took, &headers);
    response
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use tokio::net::TcpListener;
    use tower::ServiceExt;

    use super::*;

    const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn new(next_url: &str) -> Router {
        router(Arc::new(Service::new("good day".to_string(), next_url).unwrap()))
    }

    async fn get(router: &Router, path: &str) -> (StatusCode, String) {
        let request = Request::builder()
            .uri(path)
            .header("traceparent", TRACEPARENT)
            .header("cookie", "secret")
            .body(axum::body::Body::empty())
            .unwrap();
        let response = router.clone().oneshot(request).await.unwrap();
        let status = response.status();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn answers() {
        let router = new("");
        assert_eq!(get(&router, "/health").await, (StatusCode::OK, r#"{"status":"healthy"}"#.to_string()));
        assert_eq!(get(&router, "/ready").await, (StatusCode::OK, r#"{"status":"ready"}"#.to_string()));
        let (status, body) = get(&router, "/service-name").await;
        assert_eq!(status, StatusCode::OK);
        assert_eq!(body.parse::<Value>().unwrap(), json!({"service": SERVICE, "message": "good day"}));
        assert_eq!(get(&router, "/nowhere").await.0, StatusCode::NOT_FOUND);
    }

    #[tokio::test]
    async fn asks_the_next_and_passes_the_trace_on() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let next = {
            let seen = seen.clone();
            Router::new()
                .route("/next", axum::routing::get(async move |headers: HeaderMap| {
                    seen.lock().unwrap().push(headers);
                    Json(json!({"service": "next"}))
                }))
                .route("/broken", axum::routing::get(|| async { (StatusCode::SERVICE_UNAVAILABLE, "overloaded") }))
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, next).await });

        let (status, body) = get(&new(&format!("{url}/next")), "/service-name").await;
        assert_eq!((status, &body.parse::<Value>().unwrap()["next"]), (StatusCode::OK, &json!({"service": "next"})), "{body}");
        let seen = seen.lock().unwrap().remove(0);
        assert_eq!(trace::text(&seen, "traceparent"), TRACEPARENT);
        assert_eq!(trace::text(&seen, "cookie"), "");

        let (status, body) = get(&new(&format!("{url}/broken")), "/service-name").await;
        assert_eq!(status, StatusCode::BAD_GATEWAY);
        assert!(body.contains("503"), "{body}");
        assert!(Service::new(String::new(), "http://[").is_err());
    }

    #[tokio::test]
    async fn counts_requests() {
        let router = new("");
        for _ in 0..3 {
            get(&router, "/service-name").await;
        }
        get(&router, "/nowhere").await;
        let (status, text) = get(&router, "/metrics").await;
        assert_eq!(status, StatusCode::OK);
        for line in [
            r#"http_requests_total{method="GET",path="/service-name",status="200"} 3"#,
            r#"http_request_duration_seconds_count{method="GET",path="/service-name"} 3"#,
        ] {
            assert!(text.contains(line), "{line} is not in {text}");
        }
        assert!(!text.contains("/health"), "{text}");
    }
}

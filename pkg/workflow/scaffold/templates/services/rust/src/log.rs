//! Log lines as JSON, with the fields that the services of all languages have.

use std::time::{Duration, SystemTime};

use axum::http::HeaderMap;
use serde_json::{Value, json};

use crate::trace;

pub const SERVICE: &str = "service-name";

pub fn info(message: &str) {
    println!("{}", line(message));
}

/// The line of a request that was answered.
pub fn request(method: &str, path: &str, status: u16, took: Duration, headers: &HeaderMap) {
    let (trace, span) = trace::of(headers);
    let mut line = line("request");
    line["method"] = method.into();
    line["path"] = path.into();
    line["status"] = status.into();
    line["duration_ms"] = json!(took.as_micros() as f64 / 1000.0);
    line["trace_id"] = trace.into();
    line["span_id"] = span.into();
    line["request_id"] = trace::text(headers, "x-request-id").into();
    println!("{line}");
}

fn line(message: &str) -> Value {
    json!({
        "time": humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
        "level": "info",
        "service": SERVICE,
        "message": message,
    })
}

//! Log lines as JSON, with the fields that the services of all languages have.

use std::time::{Duration, SystemTime};

use axum::http::HeaderMap;
use serde_json::{Value, json};

pub const SERVICE: &str = "rust-service";

pub fn info(message: &str) {
    println!("{}", line(message));
}

/// The line of a request that was answered.
pub fn request(method: &str, path: &str, status: u16, took: Duration, headers: &HeaderMap) {
    let mut line = line("request");
    let trace = Trace::of(headers);
    line["method"] = method.into();
    line["path"] = path.into();
    line["status"] = status.into();
    line["duration_ms"] = json!(took.as_micros() as f64 / 1000.0);
    line["trace_id"] = trace.id.into();
    line["span_id"] = trace.span.into();
    line["request_id"] = text(headers, "x-request-id").into();
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

/// The trace that a request belongs to, as W3C's header or B3's say it; empty without one.
#[derive(Debug, PartialEq)]
pub struct Trace {
    pub id: String,
    pub span: String,
}

impl Trace {
    pub fn of(headers: &HeaderMap) -> Trace {
        let parts: Vec<&str> = text(headers, "traceparent").split('-').collect();
        let (id, span) = match parts[..] {
            [_, id, span, _] => (id, span),
            _ => (text(headers, "x-b3-traceid"), text(headers, "x-b3-spanid")),
        };
        Trace { id: id.to_string(), span: span.to_string() }
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace(headers: &[(&'static str, &str)]) -> (String, String) {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(*name, value.parse().unwrap());
        }
        let trace = Trace::of(&map);
        (trace.id, trace.span)
    }

    #[test]
    fn trace_of_headers() {
        let w3c = ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
        let b3 = [("x-b3-traceid", "a"), ("x-b3-spanid", "b")];
        let seen = ("4bf92f3577b34da6a3ce929d0e0e4736".to_string(), "00f067aa0ba902b7".to_string());
        assert_eq!(trace(&[w3c]), seen);
        assert_eq!(trace(&[w3c, b3[0], b3[1]]), seen);
        assert_eq!(trace(&b3), ("a".to_string(), "b".to_string()));
        assert_eq!(trace(&[("traceparent", "nonsense")]), (String::new(), String::new()));
        assert_eq!(trace(&[]), (String::new(), String::new()));
    }
}

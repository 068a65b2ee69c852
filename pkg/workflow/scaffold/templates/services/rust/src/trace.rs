//! The trace that a request belongs to. The sidecars make the spans; an app has to pass on what they wrote into the request.

use axum::http::HeaderMap;

const PASSED_ON: [&str; 9] = [
    "traceparent", "tracestate", "x-request-id", "b3",
    "x-b3-traceid", "x-b3-spanid", "x-b3-parentspanid", "x-b3-sampled", "x-b3-flags",
];

/// Those of a request's headers that a call made for it has to carry.
pub fn headers(from: &HeaderMap) -> HeaderMap {
    from.iter()
        .filter(|(name, _)| PASSED_ON.contains(&name.as_str()))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

/// Trace and span in W3C's header or in B3's; empty without one.
pub fn of(headers: &HeaderMap) -> (&str, &str) {
    let parts: Vec<&str> = text(headers, "traceparent").split('-').collect();
    match parts[..] {
        [_, id, span, _] => (id, span),
        _ => (text(headers, "x-b3-traceid"), text(headers, "x-b3-spanid")),
    }
}

/// The text of a header; empty without one.
pub fn text<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(headers: &[(&'static str, &str)]) -> HeaderMap {
        headers.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    #[test]
    fn trace_of_headers() {
        let w3c = ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
        let b3 = [("x-b3-traceid", "a"), ("x-b3-spanid", "b")];
        assert_eq!(of(&map(&[w3c, b3[0]])), ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"));
        assert_eq!(of(&map(&b3)), ("a", "b"));
        assert_eq!(of(&map(&[("traceparent", "nonsense")])), ("", ""));
    }

    #[test]
    fn passes_on_what_belongs_to_the_trace() {
        let sent: Vec<(&'static str, &str)> = PASSED_ON.iter().map(|name| (*name, *name)).collect();
        let mut all = map(&sent);
        all.insert("cookie", "secret".parse().unwrap());
        assert_eq!(headers(&all), map(&sent));
    }
}

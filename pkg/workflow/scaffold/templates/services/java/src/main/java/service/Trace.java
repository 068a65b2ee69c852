package service;

import java.util.List;
import java.util.function.UnaryOperator;

/** The trace that a request belongs to, as W3C's header or B3's say it; empty without one. */
record Trace(String id, String span) {

    /**
     * The headers of a request that a call made for it has to carry. The sidecars make the spans and write them into these;
     * only the app knows which call belongs to which request.
     */
    static final List<String> PASSED_ON = List.of(
            "traceparent", "tracestate", "x-request-id", "b3",
            "x-b3-traceid", "x-b3-spanid", "x-b3-parentspanid", "x-b3-sampled", "x-b3-flags");

    /** The trace of a request whose headers are these; a header that is not there is null. */
    static Trace of(UnaryOperator<String> header) {
        String w3c = header.apply("traceparent");
        String[] parts = w3c == null ? new String[0] : w3c.split("-");
        if (parts.length == 4) {
            return new Trace(parts[1], parts[2]);
        }
        String id = header.apply("x-b3-traceid");
        String span = header.apply("x-b3-spanid");
        return new Trace(id == null ? "" : id, span == null ? "" : span);
    }
}

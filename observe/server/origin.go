package server

import (
	"net/http"
	"net/url"
)

// sameOrigin refuses what pages of other origins make a browser request. Which name the store has in a browser is not known here (a Service's, a
// forwarded port's, an ingress'), so it is not checked: a browser sends the origin of a request. A browser that does not lets no page of
// another origin read the response, as there is no CORS, and writing needs more than such a page can send.
func sameOrigin(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !fromHere(r) {
			http.Error(w, "requests of other pages are refused", http.StatusForbidden)
			return
		}
		next.ServeHTTP(w, r)
	})
}

func fromHere(r *http.Request) bool {
	for _, text := range r.Header.Values("Origin") {
		origin, err := url.Parse(text)
		if err != nil || origin.Host == "" || origin.Host != r.Host {
			return false
		}
	}
	for _, site := range r.Header.Values("Sec-Fetch-Site") {
		switch site {
		case "same-origin", "none":
		default:
			// A link from elsewhere opens the page, but the linking page cannot read it.
			if r.Method != http.MethodGet || r.Header.Get("Sec-Fetch-Mode") != "navigate" || r.Header.Get("Sec-Fetch-Dest") != "document" || isQuery(r) {
				return false
			}
		}
	}
	return true
}

// Command greeter greets in the language that the browser prefers, among those that it knows.
package main

import (
	"fmt"
	"log"
	"net/http"

	"golang.org/x/text/language"
)

func main() {
	greetings := []string{"Hello", "Hallo", "Bonjour"}
	known := language.NewMatcher([]language.Tag{language.English, language.German, language.French})
	http.HandleFunc("GET /", func(w http.ResponseWriter, r *http.Request) {
		wanted, _, err := language.ParseAcceptLanguage(r.Header.Get("Accept-Language"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		_, best, _ := known.Match(wanted...)
		fmt.Fprintln(w, greetings[best])
	})
	log.Fatal(http.ListenAndServe(":8080", nil))
}

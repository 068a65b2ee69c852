package page

import (
	"bytes"
	"compress/gzip"
	"embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"mime"
	"net/http"
	"path"
	"strconv"
	"strings"
)

//go:embed all:dist
var built embed.FS

// views are the first parts of the page's own paths. The browser shows the view; all of them are the same file.
var views = []string{"graph", "edge", "request", "logs", "traces", "compare", "metrics", "workloads", "rollouts", "events", "nodes"}

// unbuilt is the page of a program that was compiled without one.
const unbuilt = `<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Polymesh</title>
<h1>The page is not built</h1>
<p>This program was compiled without its page. <code>npm ci --ignore-scripts</code> and <code>node build.mjs</code> in <code>observe/web</code> build it, before the program is compiled. The API works.</p>
</html>
`

// noView answers a browser's request for a path that is no view.
const noView = `<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Not found – Polymesh</title>
<h1>There is no such page</h1>
<p><a href="/">The overview</a> has links to all views.</p>
</html>
`

// files are the files of the page, each as brotli and gzip. For clients that accept neither, they are decompressed.
type files struct {
	index string
	known map[string]bool // by name, without .gz and .br
}

func newFiles() (*files, error) {
	f := &files{known: map[string]bool{}}
	entries, err := fs.ReadDir(built, "dist")
	if err != nil {
		return nil, fmt.Errorf("read the files of the page: %w", err)
	}
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), ".gz"); ok {
			f.known[name] = true
		}
	}
	if f.known["index.html"] {
		f.index = "index.html"
	}
	return f, nil
}

func (f *files) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	name := strings.TrimPrefix(r.URL.Path, "/")
	first, _, _ := strings.Cut(name, "/")
	switch {
	case f.known[name] && name != "index.html":
		// The name has the hash of the contents.
		w.Header().Set("Cache-Control", "public, max-age=31536000, immutable")
	case name == "" || isView(first):
		w.Header().Set("Cache-Control", "no-cache")
		if f.index == "" {
			w.Header().Set("Content-Type", "text/html; charset=utf-8")
			_, _ = io.WriteString(w, unbuilt) // the browser may have gone
			return
		}
		name = f.index
	case strings.Contains(r.Header.Get("Accept"), "text/html"):
		// A mistyped address. Programs that ask for a path which does not exist get the plain answer.
		w.Header().Set("Cache-Control", "no-cache")
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		w.WriteHeader(http.StatusNotFound)
		if r.Method != http.MethodHead {
			_, _ = io.WriteString(w, noView)
		}
		return
	default:
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Content-Type", mime.TypeByExtension(path.Ext(name)))
	w.Header().Set("Vary", "Accept-Encoding")
	if err := f.send(w, r, name); err != nil {
		http.Error(w, "the file cannot be read", http.StatusInternalServerError)
	}
}

func isView(name string) bool {
	for _, v := range views {
		if v == name {
			return true
		}
	}
	return false
}

// send writes a file in the best encoding that the client accepts.
func (f *files) send(w http.ResponseWriter, r *http.Request, name string) error {
	for _, e := range []struct{ encoding, suffix string }{{"br", ".br"}, {"gzip", ".gz"}} {
		if !accepts(r, e.encoding) {
			continue
		}
		data, err := fs.ReadFile(built, "dist/"+name+e.suffix)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		w.Header().Set("Content-Encoding", e.encoding)
		write(w, r, data)
		return nil
	}
	packed, err := fs.ReadFile(built, "dist/"+name+".gz")
	if err != nil {
		return err
	}
	unpack, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return err
	}
	data, err := io.ReadAll(unpack)
	if err != nil {
		return err
	}
	write(w, r, data)
	return nil
}

func write(w http.ResponseWriter, r *http.Request, data []byte) {
	w.Header().Set("Content-Length", strconv.Itoa(len(data)))
	if r.Method != http.MethodHead {
		_, _ = w.Write(data) // the browser may have gone
	}
}

// accepts reports whether a client accepts an encoding. Only a refusal by q=0 counts as one.
func accepts(r *http.Request, encoding string) bool {
	for part := range strings.SplitSeq(r.Header.Get("Accept-Encoding"), ",") {
		name, weight, _ := strings.Cut(strings.TrimSpace(part), ";")
		if strings.TrimSpace(name) == encoding {
			q := strings.ReplaceAll(weight, " ", "")
			return q != "q=0" && q != "q=0.0" && q != "q=0.00" && q != "q=0.000"
		}
	}
	return false
}

package registry

import (
	"encoding/json"
	"fmt"
	"net/http"
	"regexp"
	"strings"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"polymesh.dev/polymesh/pkg/imagestore"
)

// kind is what a request is for.
type kind string

const (
	manifests kind = "manifests"
	blobs     kind = "blobs"
)

// request is a request for a manifest or a blob (https://github.com/opencontainers/distribution-spec/blob/main/spec.md#pull), all of whose
// parts are valid.
type request struct {
	// host is the registry in the image's name: docker.io. path is the rest of the repository: library/redis.
	host, path string
	kind       kind
	// tag and digest are what is asked for; one of them is empty.
	tag    string
	digest digest.Digest
	// span is the value of the header Range, empty for all. It is one range with a start.
	span string
}

// maxName is the limit of a repository's name, in bytes, as in reference.NameTotalLengthMax, and of a host's.
const maxName = 255

var span = regexp.MustCompile(`^bytes=[0-9]{1,18}-[0-9]{0,18}$`)

// parse reads a request. containerd names the image's registry in ns.
func parse(r *http.Request) (request, error) {
	var q request
	path, ok := strings.CutPrefix(r.URL.Path, "/v2/")
	if !ok {
		return q, fmt.Errorf("not below /v2/")
	}
	host := r.URL.Query().Get("ns")
	if len(path) > 2*maxName+128 || len(host) > maxName {
		return q, fmt.Errorf("the name is too long")
	}
	for _, k := range []kind{manifests, blobs} {
		at := strings.LastIndex(path, "/"+string(k)+"/")
		if at < 0 {
			continue
		}
		ref := path[at+len(k)+2:]
		named, err := reference.ParseNormalizedNamed(host + "/" + path[:at])
		if err != nil {
			return q, err
		}
		// What the parser adds or leaves out would be another name.
		q.host, q.path, q.kind = reference.Domain(named), reference.Path(named), k
		if q.host != host || q.path != path[:at] || !reference.IsNameOnly(named) {
			return q, fmt.Errorf("%q is not the name of a repository of %q", path[:at], host)
		}
		if strings.Contains(ref, ":") || k == blobs {
			if q.digest, err = digest.Parse(ref); err != nil {
				return q, err
			}
		} else {
			if _, err := reference.WithTag(named, ref); err != nil {
				return q, err
			}
			q.tag = ref
		}
		if text := r.Header.Get("Range"); k == blobs && span.MatchString(text) {
			q.span = text
		}
		return q, nil
	}
	return q, fmt.Errorf("neither a manifest nor a blob")
}

// repository is the full name of the repository: docker.io/library/redis.
func (q request) repository() string { return q.host + "/" + q.path }

// ref is the tag or digest.
func (q request) ref() string {
	if q.digest != "" {
		return q.digest.String()
	}
	return q.tag
}

// name is the full name of the image: docker.io/library/redis:8.
func (q request) name() string {
	if q.digest != "" {
		return q.repository() + "@" + q.digest.String()
	}
	return q.repository() + ":" + q.tag
}

// target is the request's path and query for another node.
func (q request) target() string {
	return "/v2/" + q.path + "/" + string(q.kind) + "/" + q.ref() + "?ns=" + q.host
}

// scope is from which nodes an image is taken.
type scope int

const (
	nowhere scope = iota
	// servers are the nodes with a control plane. They decide what runs in the cluster anyway.
	servers
	everyNode
)

// scope returns from which nodes the image that a tag or digest names is taken. A tag is what the node that answers says it is, so tags
// are taken from servers only, unless their name can only be of one image, or opened is set.
func (q request) scope(opened bool) scope {
	switch {
	case q.digest != "":
		return everyNode // containerd verifies it
	case imagestore.CheckTag(q.tag) != nil:
		return nowhere
	case opened, imagestore.BuiltTag.MatchString(q.tag), imagestore.SignatureTag.MatchString(q.tag): // a signature is verified by its key
		return everyNode
	}
	return servers
}

// refuse answers with an error in the registries' form
// (https://github.com/opencontainers/distribution-spec/blob/main/spec.md#error-codes).
func refuse(w http.ResponseWriter, status int, code, message string) {
	text, err := json.Marshal(map[string]any{"errors": []map[string]string{{"code": code, "message": message}}})
	if err != nil {
		text = nil
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(text)
}

// code is the error code of what is not there.
func (q request) code() string {
	if q.kind == blobs {
		return "BLOB_UNKNOWN"
	}
	return "MANIFEST_UNKNOWN"
}

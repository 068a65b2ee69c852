package registry

import "testing"

// However many manifests come at a time, they do not fill the memory; a user cannot take all of what there is.
func TestDocuments(t *testing.T) {
	u := newUploads()
	var ends []func()
	begin := func(user string, size int64) (n int) {
		for {
			end, ok := u.document(user, size)
			if !ok {
				return n
			}
			ends = append(ends, end)
			n++
		}
	}
	if n := begin("large", maxManifest); n != userDocuments/maxManifest {
		t.Errorf("%d of the largest of one user", n)
	}
	if n := begin("unknown", -1); n != userDocuments/maxManifest {
		t.Errorf("%d without a length of one user", n)
	}
	// As many as a deploy of many services pushes at a time.
	if n := begin("small", 2<<10); n != userDocuments/minDocument || n < 16 {
		t.Errorf("%d small ones of one user", n)
	}
	begin("fourth", maxManifest)
	if n := begin("fifth", 1); n > 0 {
		t.Errorf("%d more than there is memory for", n)
	}
	for _, end := range ends {
		end()
	}
	if len(u.documents) > 0 {
		t.Errorf("what has ended counts: %v", u.documents)
	}
}

// A document has its limits in every repository.
func TestOfUpload(t *testing.T) {
	for path, want := range map[string]bool{
		"v2/shop/api/blobs/uploads/MDEy": true, "v2/shop/api/manifests/1": false, "v2/shop/blobs/uploads/api/manifests/1": false,
		"v2/shop/blobs/uploads/manifests/1": false, "v2/shop/api/blobs/uploads/x/": false, "": false, "v2": false,
	} {
		if got := ofUpload(path); got != want {
			t.Errorf("%q: %t", path, got)
		}
	}
}

package compress

import (
	"bytes"
	"os"
	"testing"

	"github.com/klauspost/compress/zstd"
)

func TestFrameIsReadByTheGoLibraryAndKept(t *testing.T) {
	store := Store{Dir: t.TempDir(), Level: 3}
	content := bytes.Repeat([]byte("polymesh "), 100_000)
	frame, err := store.Frame(t.Context(), content)
	if err != nil {
		t.Fatal(err)
	}
	decoder, err := zstd.NewReader(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer decoder.Close()
	back, err := decoder.DecodeAll(frame, nil)
	if err != nil || !bytes.Equal(back, content) {
		t.Fatalf("the frame does not give the content back: %v", err)
	}

	kept, err := os.ReadDir(store.Dir)
	if err != nil || len(kept) != 1 {
		t.Fatalf("the cache holds %v, %v", kept, err)
	}
	// Without zstd, only the cache can provide it.
	t.Setenv("PATH", "")
	if again, err := store.Frame(t.Context(), content); err != nil || !bytes.Equal(again, frame) {
		t.Errorf("the kept frame is not used: %v", err)
	}
}

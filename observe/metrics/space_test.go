package metrics

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"polymesh.dev/polymesh/observe/disktest"
	"polymesh.dev/polymesh/observe/scrapeconfig"
)

// A disk that is nearly full takes no more metrics, and says so; those who send them try again, and reading goes on.
func TestFullDisk(t *testing.T) {
	disk := disktest.Mount(t, "128m")
	s := open(t, Options{
		Dir: filepath.Join(disk, "metrics"), MinFreeBytes: 40 << 20, RemoteWrite: true,
		Base: fast(t, scrapeconfig.Options{Local: []string{scrapeconfig.JobSelf}}),
	})
	server := httptest.NewServer(s.IngestHandler())
	defer server.Close()
	in := &store{t: t, url: server.URL}
	write := func(value string) int {
		code, _ := in.post("/api/v1/write", "application/x-protobuf", writeRequest(t, sample("sent", value, time.Now())))
		return code
	}
	require.Equal(t, http.StatusNoContent, write("before"))
	s.is(`up{job="polymesh-observe"}`, 1)
	require.Empty(t, s.Problem())

	big := filepath.Join(disk, "big")
	require.NoError(t, os.WriteFile(big, make([]byte, 100<<20), 0o600))
	s.eventually("metrics are stored on a full disk", func() bool { return write("meanwhile") == http.StatusInternalServerError })
	require.Equal(t, http.StatusInternalServerError, write("while"))
	require.Contains(t, s.Problem(), "of which 40 stay free")
	newest := s.Newest()
	s.eventually("nothing was scraped", func() bool { return s.Numbers()["commits_refused"] > 3 })
	require.Equal(t, newest, s.Newest())
	require.NotEmpty(t, s.query(`sent{a="before"}`))
	require.Empty(t, s.query(`sent{a="while"}`))

	require.NoError(t, os.Remove(big))
	s.eventually("metrics are not stored again", func() bool { return write("after") == http.StatusNoContent })
	s.eventually("nothing is scraped again", func() bool { return s.Newest().After(newest.Add(time.Second)) })
	require.Empty(t, s.Problem())
}

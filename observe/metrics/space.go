package metrics

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"
)

// errShort means that the disk is nearly full. Prometheus' TSDB itself writes until nothing is left, also of what others need.
var errShort = errors.New("the disk is nearly full")

// lookEvery is how old the known free space may be.
const lookEvery = time.Second

// space is the free space of the disk of metrics.
type space struct {
	dir     string
	min     int64 // bytes that stay free
	refused atomic.Int64

	mu     sync.Mutex
	looked time.Time
	free   int64
}

func newSpace(dir string, least int64, reg prometheus.Registerer) *space {
	s := &space{dir: dir, min: least}
	reg.MustRegister(counter(&s.refused, prometheus.CounterOpts{
		Name: "polymesh_observe_commits_refused_total", Help: "Scrapes, evaluations of rules and requests whose samples were not stored because the disk is nearly full.",
	}))
	return s
}

// short returns errShort, with figures, if less is free than has to be. A disk that cannot be read is not short: writes to it say so.
func (s *space) short() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now := time.Now(); now.Sub(s.looked) >= lookEvery || now.Before(s.looked) {
		var fs unix.Statfs_t
		if err := unix.Statfs(s.dir, &fs); err != nil {
			return nil
		}
		s.looked, s.free = now, int64(fs.Bavail)*fs.Bsize
	}
	if s.free >= s.min {
		return nil
	}
	return fmt.Errorf("%w: %s has %d MiB left, of which %d stay free: no metrics are stored until there is more", errShort, s.dir, s.free>>20, s.min>>20)
}

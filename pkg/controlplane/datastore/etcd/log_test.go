package etcd

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
)

// What etcd reports although it is no problem is not logged; everything else from warnings on is.
func TestLog(t *testing.T) {
	var out bytes.Buffer
	log := (&Etcd{log: slog.New(slog.NewTextHandler(&out, nil))}).zap()
	log.Error("Validation on configuration change failed")
	log.Warn("rejecting promote learner: it is not ready")
	log.Info("information")
	if out.Len() > 0 {
		t.Errorf("logged:\n%s", &out)
	}
	log.Error("the disk is full")
	log.Warn("the disk is slow")
	if text := out.String(); !strings.Contains(text, `level=ERROR msg="etcd: the disk is full"`) || !strings.Contains(text, `level=WARN msg="etcd: the disk is slow"`) {
		t.Errorf("logged:\n%s", text)
	}
}

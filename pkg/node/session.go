package node

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/layout"
)

// Session knows whether the node's files may have lost writes: whether the machine, and not just the server, has ended
// since it wrote them. It owns <data-dir>/agent/session.json, which a power cut leaves as it is, and a file in the run
// directory, which is gone after a boot.
type Session struct {
	file, mark string
	dataDir    string

	mu    sync.Mutex
	state sessionState
}

type sessionState struct {
	// ID is a random one for each start; the mark in the run directory holds it too.
	ID string `json:"id"`
	// Ended says that everything was synced before the server ended.
	Ended bool `json:"ended"`
	// Doubt says that writes may have been lost, and that no one has looked yet at what they left.
	Doubt bool `json:"doubt"`
}

// NewSession returns the session of a data dir, not yet begun.
func NewSession(dataDir layout.DataDir) *Session {
	return &Session{file: dataDir.Agent("session.json"), mark: dataDir.Run("session"), dataDir: string(dataDir)}
}

// Begin notes that a server runs from now on. With existed, there is something that an earlier one has left.
func (s *Session) Begin(existed bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var last sessionState
	text, err := os.ReadFile(s.file)
	if err == nil {
		err = json.Unmarshal(text, &last)
	}
	mark, markErr := os.ReadFile(s.mark)
	if markErr != nil && !errors.Is(markErr, fs.ErrNotExist) {
		return fmt.Errorf("read what the last server has left: %w", markErr)
	}
	// A file that is missing is an older version's, or torn: that is not known to be whole either.
	unknown := err != nil
	s.state = sessionState{ID: rand.Text(), Doubt: existed && (unknown || last.Doubt || !last.Ended && string(mark) != last.ID)}
	// The mark comes second: between the two a cut leaves a mark that fits no session.
	if err := s.write(); err != nil {
		return err
	}
	if err := atomicfile.Write(s.mark, []byte(s.state.ID), 0o600); err != nil {
		return fmt.Errorf("mark the run directory: %w", err)
	}
	return nil
}

// Doubt reports whether what an earlier server has left may be torn.
func (s *Session) Doubt() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state.Doubt
}

// Checked notes that what was left is whole now.
func (s *Session) Checked() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.state.Doubt {
		return nil
	}
	if err := atomicfile.SyncFilesystem(s.dataDir); err != nil {
		return err
	}
	s.state.Doubt = false
	return s.write()
}

// End syncs what was written and notes that.
func (s *Session) End() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state.ID == "" || s.state.Ended {
		return nil
	}
	if err := atomicfile.SyncFilesystem(s.dataDir); err != nil {
		return err
	}
	s.state.Ended = true
	return s.write()
}

func (s *Session) write() error {
	text, err := json.Marshal(s.state)
	if err != nil {
		return err
	}
	if err := atomicfile.Write(s.file, append(text, '\n'), 0o600); err != nil {
		return fmt.Errorf("note the state of the node's files: %w", err)
	}
	return nil
}

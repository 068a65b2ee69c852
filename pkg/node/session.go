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

// Session determines whether the node's files may have lost writes: whether the machine, and not just the server, has stopped
// since they were written. It owns <data-dir>/agent/session.json, which survives a power failure, and a file in the run
// directory, which is gone after a reboot.
type Session struct {
	file, mark string
	dataDir    string

	mu    sync.Mutex
	state sessionState
}

type sessionState struct {
	// ID is random for each start; the mark in the run directory contains it too.
	ID string `json:"id"`
	// Ended is set if everything was synced before the server ended.
	Ended bool `json:"ended"`
	// Doubt is set if writes may have been lost, and the files have not been checked yet.
	Doubt bool `json:"doubt"`
}

// NewSession returns the session of a data dir, not yet begun.
func NewSession(dataDir layout.DataDir) *Session {
	return &Session{file: dataDir.Agent("session.json"), mark: dataDir.Run("session"), dataDir: string(dataDir)}
}

// Begin records that a server is running. existed is set if a previous one has left files.
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
		return fmt.Errorf("read the last server's mark: %w", markErr)
	}
	// A missing file is from an older version, or damaged: the files may not be intact either.
	unknown := err != nil
	s.state = sessionState{ID: rand.Text(), Doubt: existed && (unknown || last.Doubt || !last.Ended && string(mark) != last.ID)}
	// The mark is written second: a power failure in between leaves a mark that matches no session.
	if err := s.write(); err != nil {
		return err
	}
	if err := atomicfile.Write(s.mark, []byte(s.state.ID), 0o600); err != nil {
		return fmt.Errorf("mark the run directory: %w", err)
	}
	return nil
}

// Doubt reports whether files of a previous server may be damaged.
func (s *Session) Doubt() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state.Doubt
}

// Checked records that the files have been checked.
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

// End syncs the files and records that.
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
		return fmt.Errorf("record the state of the node's files: %w", err)
	}
	return nil
}

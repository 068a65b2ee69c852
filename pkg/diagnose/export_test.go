package diagnose

import "time"

// SetClock sets the time of a Surveyor.
func (s *Surveyor) SetClock(now func() time.Time) { s.now = now }

package podlogs

import (
	"regexp"
	"time"
)

// knownWithin is how long a pod's first line waits for its workload to be known.
const knownWithin = 5 * time.Second

// safe are the letters from which Kubernetes generates suffixes of names.
const safe = `[bcdfghjklmnpqrstvwxz2456789]`

var (
	ofDeployment = regexp.MustCompile(`^(.+)-` + safe + `{4,10}-` + safe + `{5}$`)
	ofSet        = regexp.MustCompile(`^(.+)-(?:` + safe + `{5}|[0-9]{1,5})$`)
)

// GuessWorkload removes the suffixes that Kubernetes has added to a pod's name.
func GuessWorkload(pod string) string {
	for _, form := range []*regexp.Regexp{ofDeployment, ofSet} {
		if m := form.FindStringSubmatch(pod); m != nil {
			return m[1]
		}
	}
	return pod
}

// findWorkload sets a container's workload. It returns false while it is worth waiting for.
func (t *Tailer) findWorkload(p *pod, c *container, now time.Time) bool {
	if c.workload != "" && !c.guessed {
		return true
	}
	if t.opts.Workload != nil {
		if name, known := t.opts.Workload(p.namespace, p.name, p.uid); known && name != "" {
			c.workload, c.guessed = name, false
			return true
		}
		if now.Sub(p.since) < knownWithin {
			return false
		}
	}
	c.workload, c.guessed = GuessWorkload(p.name), true
	return true
}

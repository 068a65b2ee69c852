package page

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"polymesh.dev/polymesh/observe/document"
	"polymesh.dev/polymesh/observe/findings"
	"polymesh.dev/polymesh/observe/logstore"
)

// diagnosisAge is how old a survey may be that is still true: one may be late.
const diagnosisAge = 2 * findings.Every

// diagnosis is what was wrong in the cluster at a time, as the server has found.
type diagnosis struct {
	// known is false if no survey was made then.
	known bool
	// made is when it was made.
	made time.Time
	// all are the findings, the worst first, and more is how many more workloads may have problems.
	all  []findings.Finding
	more int
}

// diagnosisAt returns the survey that holds at a time.
func (s *server) diagnosisAt(ctx context.Context, at time.Time) (*diagnosis, error) {
	d := &diagnosis{}
	err := s.Logs.Select(ctx, logstore.Selector{
		Matchers: []logstore.Matcher{equal("job", findings.Job)}, Start: at.Add(-diagnosisAge), End: at, Limit: maxDiagnosis, Newest: true,
	}, func(e logstore.Entry) bool {
		if d.made.IsZero() {
			d.made = e.Time
		}
		if !e.Time.Equal(d.made) {
			return false
		}
		if metadata(e, "kind") == findings.KindSurvey {
			var sum findings.Summary
			d.known = json.Unmarshal([]byte(e.Line), &sum) == nil
			d.more = sum.More
			return true
		}
		var f findings.Finding
		if json.Unmarshal([]byte(e.Line), &f) == nil {
			d.all = append(d.all, f)
		}
		return true
	})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(d.all, func(a, b findings.Finding) int {
		return cmp.Or(before(a.Bad, b.Bad), a.Since.Compare(b.Since), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Reason, b.Reason))
	})
	return d, nil
}

// ofCluster is the kind of a finding about the cluster's servers, and no object.
const ofCluster = "Cluster"

// maxDiagnosis bounds the entries of a survey.
const maxDiagnosis = 500

func before(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return -1
	}
	return 1
}

// of returns the findings about a workload.
func (d *diagnosis) of(k objectKey) []findings.Finding {
	list := []findings.Finding{}
	for _, f := range d.all {
		if f.Namespace == k.namespace && f.Kind == k.kind && f.Name == k.name {
			list = append(list, f)
		}
	}
	return list
}

// The reasons of findings that name no cause of why pods are not ready.
const (
	undetermined = "Undetermined"
	noSidecar    = "InjectionMissing"
)

// phrase says in a few words what a finding is about.
func phrase(f findings.Finding) string {
	container := "container " + f.Container
	switch f.Reason {
	case "Pending":
		return "a pod waits for a node"
	case "ImagePull":
		return "the image of " + container + " cannot be pulled"
	case "Configuration":
		if f.Container == "" {
			return "a volume cannot be mounted"
		}
		return container + " lacks what it is configured with"
	case "Crash":
		return container + " ends again and again"
	case "OutOfMemory":
		return container + " is killed at its memory limit"
	case "ProbeFailing":
		return "the probe of " + container + " fails"
	case noSidecar:
		return "a pod has no sidecar"
	case "Refused":
		return "no pod can be created"
	case "Deleting":
		if f.Pod != "" {
			return "a pod is not removed"
		}
		return "it was deleted and still exists"
	case undetermined:
		return "why is not known yet"
	}
	return ""
}

// why is what the cluster reports, as sentences.
func (d *diagnosis) why(f findings.Finding) string {
	text := f.Message
	switch {
	case f.Pod != "" && f.Container != "":
		text = fmt.Sprintf("container %s of pod %s: %s", f.Container, f.Pod, text)
	case f.Pod != "" && !strings.Contains(text, f.Pod):
		text = fmt.Sprintf("pod %s: %s", f.Pod, text)
	}
	if text = sentence(text); !f.Checked.IsZero() {
		text += fmt.Sprintf(" It could not be checked again for %s: the cluster answers too slowly.", max(d.made.Sub(f.Checked), time.Second).Round(time.Second))
	}
	return text
}

// sentence begins with a capital letter, and ends.
func sentence(text string) string {
	if text = strings.TrimSpace(text); text == "" {
		return ""
	}
	// A name, or code, stays as it is.
	if first, size := utf8.DecodeRuneInString(text); unicode.IsLower(first) {
		if word, _, _ := strings.Cut(text, " "); !strings.ContainsAny(word, "./:=`\"") {
			text = string(unicode.ToUpper(first)) + text[size:]
		}
	}
	if !strings.ContainsAny(text[len(text)-1:], ".!?") {
		text += "."
	}
	return text
}

// statements says what is wrong: one sentence for each object.
func (d *diagnosis) statements(namespaces []string) []statement {
	type object struct{ kind, namespace, name, text string }
	seen := map[object]bool{}
	var list []statement
	left := 0
	for _, f := range d.all {
		of := object{f.Kind, f.Namespace, f.Name, ""}
		if f.Kind == ofCluster {
			of.text = f.Message
		}
		if seen[of] || f.Namespace != "" && len(namespaces) > 0 && !slices.Contains(namespaces, f.Namespace) {
			continue
		}
		seen[of] = true
		if len(list) == maxStatements {
			left++
			continue
		}
		st := statement{Level: warn, Why: d.why(f), Advice: sentence(f.Advice)}
		if !f.Since.IsZero() {
			st.Since = f.Since.UnixMilli()
		}
		if f.Bad {
			st.Level = bad
		}
		switch {
		case f.Kind == ofCluster:
			st.Text, st.Why = sentence(f.Message), ""
		case f.Kind == findings.KindNamespace:
			st.Text = "Namespace " + f.Name + " was deleted and still exists."
		case f.Namespace != "":
			st.Link, st.Text = route("workloads", f.Namespace, f.Name), fmt.Sprintf("%s in %s: %s.", f.Name, f.Namespace, troubled(f))
		default:
			st.Link, st.Text = "/nodes", "Node "+f.Name+" is under pressure."
			if f.Bad {
				st.Text = "Node " + f.Name + " is not ready."
			}
		}
		list = append(list, st)
	}
	if left += d.more; left > 0 {
		list = append(list, statement{Level: warn, Text: plural(left, "more object has", "more objects have") + " problems.", Link: "/workloads?trouble=1"})
	}
	return list
}

// explained returns the pods of which the diagnosis says why they are not ready. A finding names one pod of those that have the same problem.
func (d *diagnosis) explained(all []document.Workload) map[podKey]bool {
	pods, of := map[podKey]bool{}, map[objectKey]bool{}
	for _, f := range d.all {
		if f.Namespace != "" && f.Reason != undetermined && f.Reason != noSidecar {
			pods[podKey{f.Namespace, f.Pod}] = true
			of[objectKey{f.Namespace, f.Kind, f.Name}] = true
		}
	}
	for i := range all {
		if w := &all[i]; of[keyOf(w)] {
			for _, pod := range w.Pods {
				pods[podKey{w.Namespace, pod.Name}] = true
			}
		}
	}
	return pods
}

// troubled says how much of a workload works, and why not all of it.
func troubled(f findings.Finding) string {
	text := ""
	if f.Replicas > 0 && f.Ready < f.Replicas {
		text = fmt.Sprintf("%d of %s ready", f.Ready, plural(f.Replicas, "pod is", "pods are"))
	}
	switch what := phrase(f); {
	case what == "":
		return cmp.Or(text, "it is not ready")
	case text == "":
		return what
	default:
		return text + ": " + what
	}
}

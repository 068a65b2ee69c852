package metrics

import (
	"fmt"
	"sync"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/config"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/promql/parser"

	"polymesh.dev/polymesh/observe/rulefiles"
)

// ruleFiles passes the applied files to Prometheus' rule manager, instead of files on disk.
type ruleFiles struct {
	parser parser.Parser

	mu    sync.Mutex
	files map[string]*rulefmt.RuleGroups
}

// Load implements rules.GroupLoader.
func (r *ruleFiles) Load(name string, _ bool, _ model.ValidationScheme) (*rulefmt.RuleGroups, []error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if f, ok := r.files[name]; ok {
		return f, nil
	}
	return nil, []error{fmt.Errorf("there are no rules %q", name)}
}

// Parse implements rules.GroupLoader.
func (r *ruleFiles) Parse(query string) (parser.Expr, error) { return r.parser.ParseExpr(query) }

func (m *Metrics) applyRules(c *config.Config, files []rulefiles.File) error {
	names := make([]string, 0, len(files))
	loaded := map[string]*rulefmt.RuleGroups{}
	for _, f := range files {
		names = append(names, f.Name)
		loaded[f.Name] = f.Groups
	}
	m.files.mu.Lock()
	m.files.files = loaded
	m.files.mu.Unlock()
	if err := m.rules.Update(time.Duration(c.GlobalConfig.EvaluationInterval), names, c.GlobalConfig.ExternalLabels, externalURL.String(), nil); err != nil {
		return fmt.Errorf("apply the rules: %w", err)
	}
	return nil
}

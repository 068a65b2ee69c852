// Command clients pushes metrics with Telegraf's output loki and reads them with its input logql. Each result is a line of JSON.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/influxdata/telegraf"
	"github.com/influxdata/telegraf/metric"
	"github.com/influxdata/telegraf/plugins/inputs"
	_ "github.com/influxdata/telegraf/plugins/inputs/logql"
	"github.com/influxdata/telegraf/plugins/outputs/loki"

	"github.com/influxdata/toml"
)

func main() {
	if err := run(os.Getenv("LOKI")); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(url string) error {
	for _, gzip := range []bool{false, true} {
		out := &loki.Loki{Domain: url, GZipRequest: gzip, SanitizeLabelNames: true, MetricNameLabel: "__name"}
		if err := out.Connect(); err != nil {
			return err
		}
		var metrics []telegraf.Metric
		for n := range 5 {
			metrics = append(metrics, metric.New("orders", map[string]string{"app.name": "telegraf", "host": "a", "gzip": fmt.Sprint(gzip)},
				map[string]any{"n": n, "text": "shipped"}, time.Now().Add(-time.Duration(n)*time.Second)))
		}
		if err := out.Write(metrics); err != nil {
			return err
		}
		if err := out.Close(); err != nil {
			return err
		}
	}
	in := inputs.Inputs["logql"]()
	settings := fmt.Sprintf(`
url = %q
organizations = ["one", "two"]
[[instant]]
name = "count"
query = 'sum by (gzip) (count_over_time({app_name="telegraf"}[5m]))'
[[instant]]
name = "scalar"
query = 'vector(1)+vector(1)'
[[range]]
name = "lines"
query = '{app_name="telegraf", gzip="true"} |= "shipped" | logfmt | n > 2'
start = "5m"
sorting = "forward"
limit = 10
[[range]]
name = "series"
query = 'sum(count_over_time({app_name="telegraf"}[5m]))'
start = "1m"
step = "30s"
`, url)
	if err := toml.Unmarshal([]byte(settings), in); err != nil {
		return err
	}
	if err := in.(telegraf.Initializer).Init(); err != nil {
		return err
	}
	service := in.(telegraf.ServiceInput)
	if err := service.Start(nil); err != nil {
		return err
	}
	defer service.Stop()
	acc := &accumulator{shown: map[string][]any{}}
	if err := in.Gather(acc); err != nil {
		return err
	}
	for what, result := range acc.shown {
		line, err := json.Marshal(map[string]any{"what": what, "result": result})
		if err != nil {
			return err
		}
		fmt.Println(string(line))
	}
	return acc.err
}

// accumulator keeps what the input gives.
type accumulator struct {
	telegraf.Accumulator
	shown map[string][]any
	err   error
}

func (a *accumulator) AddFields(name string, fields map[string]any, tags map[string]string, _ ...time.Time) {
	texts := []string{}
	for k, v := range fields {
		texts = append(texts, fmt.Sprintf("%s=%v", k, v))
	}
	slices.Sort(texts)
	a.shown[name] = append(a.shown[name], map[string]any{"fields": texts, "tags": tags})
}

func (a *accumulator) AddError(err error) {
	if err != nil {
		a.err = err
	}
}

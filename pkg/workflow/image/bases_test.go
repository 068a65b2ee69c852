package image

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestBases(t *testing.T) {
	for name, c := range map[string]struct {
		dockerfile, target string
		args               map[string]string
		want               []string
	}{
		"one":              {"FROM golang:1.26\n", "", nil, []string{"golang:1.26"}},
		"nothing":          {"FROM scratch\n", "", nil, nil},
		"in lower case":    {"from a as x\nfrom b\n", "", nil, []string{"b"}},
		"a platform":       {"FROM --platform=linux/amd64 a:1 AS x\n", "", nil, []string{"a:1"}},
		"an argument":      {"ARG BASE=a:1\nARG TAG=\"2\"\nFROM ${BASE}\nFROM b:$TAG\n", "", nil, []string{"b:2"}},
		"a given one":      {"ARG BASE=a:1\nFROM ${BASE}\n", "", map[string]string{"BASE": "r.example.com/b:2"}, []string{"r.example.com/b:2"}},
		"else and then":    {"ARG A\nARG B=1\nFROM a:${A:-5}-${B:+x}\n", "", nil, []string{"a:5-x"}},
		"a mystery":        {"FROM a:$TARGETARCH\n", "", nil, nil},
		"stages":           {"FROM a AS one\nFROM one AS two\nFROM b AS three\nCOPY --from=two /x /x\n", "", nil, []string{"b", "a"}},
		"by number":        {"FROM a\nFROM b\nCOPY --chown=0:0 --from=0 /x /x\n", "", nil, []string{"b", "a"}},
		"an unused stage":  {"FROM a AS one\nFROM b\n", "", nil, []string{"b"}},
		"a target":         {"FROM a AS one\nFROM b\n", "one", nil, []string{"a"}},
		"another image":    {"FROM a\nCOPY --from=c:1 /x /x\nRUN --mount=type=bind,from=d,target=/d cat /d/x\n", "", nil, []string{"a", "c:1", "d"}},
		"its own name":     {"FROM node AS node\nFROM scratch\nCOPY --from=node /x /x\n", "", nil, []string{"node"}},
		"lines that go on": {"# escape=\\\n# FROM no\nFROM \\\n  # still no\n  a:1 \\\n  AS x\n", "", nil, []string{"a:1"}},
		"another escape":   {"# escape=`\nFROM `\n  a:1\n", "", nil, []string{"a:1"}},
	} {
		t.Run(name, func(t *testing.T) {
			s := source(t, map[string]string{"Dockerfile": c.dockerfile})
			s.Target, s.Args = c.target, c.args
			got, err := s.Bases()
			if err != nil || !slices.Equal(got, c.want) {
				t.Errorf("got %q, %v, want %q", got, err, c.want)
			}
		})
	}
}

func TestShortNames(t *testing.T) {
	const line = "unqualified-search-registries = [\"docker.io\"]\n"
	for name, c := range map[string]struct {
		files map[string]string
		want  string
	}{
		"nothing is there": {nil, line},
		"Debian's":         {map[string]string{"etc/registries.conf": "# unqualified-search-registries = []\n", "etc/registries.conf.d/shortnames.conf": "[aliases]\n"}, line + "# unqualified-search-registries = []\n"},
		"a mirror":         {map[string]string{"etc/registries.conf": "[[registry]]\nprefix = \"docker.io\"\nlocation = \"m.example.com\"\n"}, line + "[[registry]]\nprefix = \"docker.io\"\nlocation = \"m.example.com\"\n"},
		"the user's file":  {map[string]string{"etc/registries.conf": "a = 1\n", "home/.config/containers/registries.conf": "b = 2\n"}, line + "b = 2\n"},
		"said":             {map[string]string{"etc/registries.conf": "unqualified-search-registries = [\"r.example.com\"]\n"}, ""},
		"said: none":       {map[string]string{"etc/registries.conf": "unqualified-search-registries = []\n"}, ""},
		"in a drop-in":     {map[string]string{"etc/registries.conf.d/x.conf": "unqualified-search-registries = [\"r.example.com\"]\n"}, ""},
		"in the user's":    {map[string]string{"home/.config/containers/registries.conf.d/x.conf": "unqualified-search-registries = [\"r.example.com\"]\n"}, ""},
		"the old form":     {map[string]string{"etc/registries.conf": "[registries.search]\nregistries = [\"r.example.com\"]\n"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv(registriesVar, "")
			dir := source(t, c.files).Context
			got, err := shortNames(filepath.Join(dir, "home"), filepath.Join(dir, "etc"))
			if err != nil || got != c.want {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
	t.Run("a file that is no TOML", func(t *testing.T) {
		t.Setenv(registriesVar, "")
		dir := source(t, map[string]string{"etc/registries.conf": "= ="}).Context
		if _, err := shortNames(filepath.Join(dir, "home"), filepath.Join(dir, "etc")); err == nil || !strings.Contains(err.Error(), "registries.conf") {
			t.Errorf("got %v", err)
		}
	})
}

// Without being asked a build gets nothing that can hold a password.
func TestSettings(t *testing.T) {
	home := t.TempDir()
	t.Setenv("HOME", home)
	for _, variable := range []string{"PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST", "PIP_DEFAULT_TIMEOUT", "NPM_CONFIG_REGISTRY", "npm_config_registry"} {
		t.Setenv(variable, "")
	}
	t.Setenv("PIP_INDEX_URL", "https://me:sesame@pip.example.com/simple")
	for _, file := range []string{".npmrc", ".m2/settings.xml", ".cargo/config.toml", ".config/go/env"} {
		path := filepath.Join(home, file)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte("token"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	mounts := func(names ...string) []string {
		t.Helper()
		got, cleanup, err := settings(names)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(cleanup)
		return got
	}
	if got := mounts(); len(got) > 0 {
		t.Errorf("unasked: %q", got)
	}
	if got := mounts("maven", "npm"); !slices.Equal(got, []string{home + "/.m2/settings.xml:/root/.m2/settings.xml", home + "/.npmrc:/root/.npmrc"}) {
		t.Errorf("got %q", got)
	}
	pip := mounts("pip")
	file, _, _ := strings.Cut(pip[len(pip)-1], ":")
	text, err := os.ReadFile(file)
	if want := "[global]\nindex-url = https://me:sesame@pip.example.com/simple\n"; err != nil || string(text) != want {
		t.Errorf("got %q, %v", text, err)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("got %v, %v", info.Mode(), err)
	}
	if got := unused([]string{"cargo", "go"}); !slices.Equal(got, []string{"maven", "npm", "pip"}) {
		t.Errorf("unasked are %q", got)
	}
	if _, _, err := settings([]string{"apt"}); err == nil {
		t.Error("apt is taken")
	}
}

func TestBuildArgs(t *testing.T) {
	flags, env, err := buildArgs(map[string]string{"B": "2 =", "A": "1"})
	if err != nil || !slices.Equal(flags, []string{"--build-arg", "A", "--build-arg", "B"}) || !slices.Equal(env, []string{"A=1", "B=2 ="}) {
		t.Errorf("got %q, %q, %v", flags, env, err)
	}
	for _, name := range []string{"PATH", "LD_PRELOAD", "CONTAINERS_STORAGE_CONF", "a-b", "--volume", "A=B", ""} {
		if _, _, err := buildArgs(map[string]string{name: "x"}); err == nil {
			t.Errorf("%q is taken", name)
		}
	}
}

func TestLoopbackProxyIsRefused(t *testing.T) {
	for value, refused := range map[string]bool{
		"http://127.0.0.1:3128": true, "localhost:3128": true, "http://[::1]:1": true, "http://proxy.example.com:3128": false, "": false,
	} {
		err := loopbackProxy([]string{"https_proxy=" + value, "OTHER=http://127.0.0.1:1"})
		if (err != nil) != refused {
			t.Errorf("%s: %v", value, err)
		}
	}
}

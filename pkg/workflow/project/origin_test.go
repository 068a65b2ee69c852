package project

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestRepository(t *testing.T) {
	for remote, want := range map[string]string{
		"https://github.com/anna/shop.git":             "github.com/anna/shop",
		"https://token:x@GitHub.com/anna/shop":         "github.com/anna/shop",
		"git@github.com:anna/shop.git":                 "github.com/anna/shop",
		"github.com:anna/shop":                         "github.com/anna/shop",
		"ssh://git@git.example.com:7999/anna/shop.git": "git.example.com:7999/anna/shop",
		"https://git.example.com/anna/../bert/shop/":   "git.example.com/bert/shop",
		"/srv/git/shop.git":                            "",
		"../shop:x":                                    "",
		"file:///srv/git/shop.git":                     "",
		"https://git.example.com":                      "",
		"://":                                          "",
	} {
		if got := repository(remote); got != want {
			t.Errorf("%s is %q, want %q", remote, got, want)
		}
	}
}

func TestOriginSame(t *testing.T) {
	repo := Origin{Repository: "github.com/anna/shop", Path: "web", Host: "a", Machine: "1", Dir: "/home/anna/shop/web"}
	with := func(change func(*Origin)) Origin {
		o := repo
		change(&o)
		return o
	}
	for name, c := range map[string]struct {
		a, b Origin
		want bool
	}{
		"itself":                            {repo, repo, true},
		"another checkout":                  {repo, with(func(o *Origin) { o.Host, o.Machine, o.Dir = "b", "2", "/builds/17" }), true},
		"another folder of the repository":  {repo, with(func(o *Origin) { o.Path = "api" }), false},
		"another repository in this folder": {repo, with(func(o *Origin) { o.Repository = "github.com/bert/shop" }), false},
		"git was not there":                 {repo, with(func(o *Origin) { o.Repository, o.Path = "", "" }), true},
		"one id":                            {with(func(o *Origin) { o.ID = "x" }), Origin{ID: "x", Host: "z", Dir: "/z"}, true},
		"two ids in one folder":             {with(func(o *Origin) { o.ID = "x" }), with(func(o *Origin) { o.ID = "y" }), false},
		"an id that is new":                 {repo, with(func(o *Origin) { o.ID = "y" }), true},
		"a folder on two machines":          {Origin{Host: "a", Machine: "1", Dir: "/app"}, Origin{Host: "a", Machine: "2", Dir: "/app"}, false},
		"nothing":                           {Origin{}, Origin{}, false},
		"not recorded":                      {Origin{}, repo, false},
	} {
		if got := c.a.Same(c.b); got != c.want || c.b.Same(c.a) != c.want {
			t.Errorf("%s: same is %v", name, got)
		}
	}
}

// TestOrigin uses real repositories: a clone, a worktree of it, and a folder without git.
func TestOrigin(t *testing.T) {
	run := func(dir string, args ...string) {
		t.Helper()
		cmd := exec.Command("git", append([]string{"-c", "user.name=x", "-c", "user.email=x@example.com", "-C", dir}, args...)...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("git %v: %v: %s", args, err, out)
		}
	}
	top := t.TempDir()
	clone, tree := filepath.Join(top, "clone"), filepath.Join(top, "tree")
	for _, dir := range []string{filepath.Join(clone, "apps", "shop"), filepath.Join(top, "shop")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	run(clone, "init", "-q")
	run(clone, "remote", "add", "origin", "https://user:secret@git.example.com/anna/shops.git")
	if err := os.WriteFile(filepath.Join(clone, "apps", "shop", "x"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	run(clone, "add", ".")
	run(clone, "commit", "-q", "-m", "x")
	run(clone, "worktree", "add", "-q", tree)
	t.Setenv("GIT_DIR", "/nowhere") // as in a hook
	at := func(dir string) Origin {
		t.Helper()
		o, err := (&Project{Dir: dir}).Origin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return o
	}
	a, b, none := at(filepath.Join(clone, "apps", "shop")), at(filepath.Join(tree, "apps", "shop")), at(filepath.Join(top, "shop"))
	if a.Repository != "git.example.com/anna/shops" || a.Path != "apps/shop" {
		t.Errorf("the clone is %+v", a)
	}
	if !a.Same(b) {
		t.Errorf("a worktree is another project: %+v", b)
	}
	if none.Repository != "" || none.Same(a) || !none.Same(at(filepath.Join(top, "shop"))) || none.Dir != filepath.Join(top, "shop") {
		t.Errorf("a folder without git is %+v", none)
	}
	if err := os.Symlink(filepath.Join(top, "shop"), filepath.Join(top, "link")); err != nil {
		t.Fatal(err)
	}
	if link := at(filepath.Join(top, "link")); !link.Same(none) {
		t.Errorf("a link to the folder is %+v", link)
	}
}

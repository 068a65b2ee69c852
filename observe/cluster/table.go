package cluster

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"
)

// maxObjects bounds the objects of a kind: a user who may create one may create many.
const maxObjects = 20_000

// table holds the objects of a kind, by "namespace/name". A cache.Reflector writes to it, instead of an informer, which would queue and
// distribute what a single function uses here. The Cluster's mutex guards it.
type table[T any] struct {
	c *Cluster
	// trim returns what is kept of an object, nil for nothing. It may change the object.
	trim func(any) *T
	// changed is called for each change, with the mutex held: old is nil for a new object, and now for a deleted one. It may be nil.
	changed func(old, now *T)
	items   map[string]*T
	synced  bool
	left    int // how often an object was left out because there are maxObjects
}

func newTable[T any](c *Cluster, trim func(any) *T, changed func(old, now *T)) *table[T] {
	return &table[T]{c: c, trim: trim, changed: changed, items: map[string]*T{}}
}

// Add implements cache.ReflectorStore.
func (t *table[T]) Add(object any) error {
	key, err := cache.MetaNamespaceKeyFunc(object)
	if err != nil {
		return err
	}
	now := t.trim(object)
	t.c.mu.Lock()
	defer t.c.mu.Unlock()
	t.set(key, now)
	return nil
}

// Update implements cache.ReflectorStore.
func (t *table[T]) Update(object any) error { return t.Add(object) }

// Delete implements cache.ReflectorStore.
func (t *table[T]) Delete(object any) error {
	key, err := cache.DeletionHandlingMetaNamespaceKeyFunc(object)
	if err != nil {
		return err
	}
	t.c.mu.Lock()
	defer t.c.mu.Unlock()
	t.set(key, nil)
	return nil
}

// Replace implements cache.ReflectorStore: these are all objects.
func (t *table[T]) Replace(objects []any, _ string) error {
	items := make(map[string]*T, len(objects))
	for _, object := range objects {
		key, err := cache.MetaNamespaceKeyFunc(object)
		if err != nil {
			return err
		}
		items[key] = t.trim(object)
	}
	t.c.mu.Lock()
	defer t.c.mu.Unlock()
	t.left = 0
	for key := range t.items {
		if items[key] == nil {
			t.set(key, nil)
		}
	}
	for key, now := range items {
		t.set(key, now)
	}
	t.synced = true
	return nil
}

// Resync implements cache.ReflectorStore.
func (*table[T]) Resync() error { return nil }

// Transformer implements cache.TransformingStore: the objects of the first list are trimmed one by one, not when all are there.
func (t *table[T]) Transformer() cache.TransformFunc {
	return func(object any) (any, error) {
		// Other tables keep something made from the object, and need it unchanged.
		if _, ok := any((*T)(nil)).(metav1.Object); ok {
			t.trim(object)
		}
		return object, nil
	}
}

// set adds an object, or removes it if it is nil.
func (t *table[T]) set(key string, now *T) {
	old := t.items[key]
	switch {
	case old == nil && now == nil:
		return
	case now == nil:
		delete(t.items, key)
	case old == nil && len(t.items) >= maxObjects:
		t.left++
		return
	default:
		t.items[key] = now
	}
	if t.changed != nil {
		t.changed(old, now)
	}
}

// get returns an object. The caller holds the mutex.
func (t *table[T]) get(namespace, name string) *T {
	if namespace != "" {
		name = namespace + "/" + name
	}
	return t.items[name]
}

func (t *table[T]) all() []*T {
	t.c.mu.Lock()
	defer t.c.mu.Unlock()
	list := make([]*T, 0, len(t.items))
	for _, item := range t.items {
		list = append(list, item)
	}
	return list
}

func (t *table[T]) size() (held, leftOut int) { return len(t.items), t.left }

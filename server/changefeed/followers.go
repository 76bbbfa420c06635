package changefeed

import (
	"maps"
	"slices"
	"sync"
)

// followers counts the open cursors by the type that they follow; "" is all types. What nobody follows here is not read:
// loading a directory costs a replica little that no stream asks for directory users.
type followers struct {
	mu    sync.Mutex
	count map[string]int
}

func (f *followers) add(recordType string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.count == nil {
		f.count = make(map[string]int)
	}
	f.count[recordType]++
}

func (f *followers) remove(recordType string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.count[recordType]--; f.count[recordType] == 0 {
		delete(f.count, recordType)
	}
}

// followed is a set of types.
type followed struct {
	all   bool
	types []string
}

// followed returns the types that cursors follow.
func (f *followers) followed() followed {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.count[""] > 0 {
		return followed{all: true}
	}
	return followed{types: slices.Sorted(maps.Keys(f.count))}
}

func (f followed) contains(recordType string) bool {
	return f.all || slices.Contains(f.types, recordType)
}

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
	// came is sent to when there is a first one.
	came chan struct{}
}

func newFollowers() followers { return followers{came: make(chan struct{}, 1)} }

func (f *followers) add(recordType string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.count) == 0 {
		f.count = make(map[string]int)
		select {
		case f.came <- struct{}{}:
		default: // it is about to be heard
		}
	}
	f.count[recordType]++
}

// none says that there are no cursors.
func (f *followers) none() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.count) == 0
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

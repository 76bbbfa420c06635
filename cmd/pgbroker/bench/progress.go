package bench

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
)

// A progress tells a person at a terminal how far things are. A nil one is silent.
type progress struct {
	out      io.Writer
	width    int
	terminal bool

	mu    sync.Mutex // protects what follows
	title string
	shown bool
}

// newProgress returns a progress for a terminal of some columns; 0 columns are no terminal, which gets the lines of say only.
func newProgress(out io.Writer, width int) *progress {
	return &progress{out: out, width: width, terminal: width > 0}
}

// step begins something that has a title.
func (p *progress) step(title string) {
	if p == nil {
		return
	}
	p.mu.Lock()
	p.title = title
	p.mu.Unlock()
	p.show("")
}

// show replaces what is said about the step.
func (p *progress) show(text string) {
	if p == nil || !p.terminal {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	line := p.title + "  " + text
	if runes := []rune(line); len(runes) >= p.width {
		line = string(runes[:p.width-1])
	}
	fmt.Fprintf(p.out, "\r\x1b[K%s", strings.TrimRight(line, " "))
	p.shown = true
}

// clear removes the line.
func (p *progress) clear() {
	if p == nil || !p.terminal {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.shown {
		fmt.Fprint(p.out, "\r\x1b[K")
		p.shown = false
	}
}

// say prints a line that stays.
func (p *progress) say(format string, args ...any) {
	if p == nil {
		return
	}
	p.clear()
	p.mu.Lock()
	defer p.mu.Unlock()
	fmt.Fprintf(p.out, format+"\n", args...)
}

// refresh is how often the line is written.
const refresh = 500 * time.Millisecond

// every shows a text again and again until the returned function is called.
func (p *progress) every(text func() string) (stop func()) {
	if p == nil || !p.terminal {
		return func() {}
	}
	done := make(chan struct{})
	var ended sync.WaitGroup
	ended.Go(func() {
		tick := time.NewTicker(refresh)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				p.show(text())
			case <-done:
				return
			}
		}
	})
	return func() { close(done); ended.Wait(); p.clear() }
}

// during shows a load while do runs.
func (p *progress) during(r *running, do func()) {
	lastCount, lastTime := int64(0), now()
	stop := p.every(func() string {
		count, at := r.all.Load(), now()
		rate := float64(count-lastCount) / time.Duration(at-lastTime).Seconds()
		lastCount, lastTime = count, at
		phase := "warm-up"
		if at >= r.begin {
			phase = fmt.Sprintf("%.0f of %.0f s", time.Duration(at-r.begin).Seconds(), r.duration.Seconds())
		}
		text := fmt.Sprintf("%s  %s/s", phase, showNumber(rate))
		if l := newLatency(r.recorder.histogram()); l != nil {
			text += fmt.Sprintf("  p50 %s  p99 %s", showMilliseconds(l.P50), showMilliseconds(l.P99))
		}
		if failed := r.failed.Load(); failed > 0 {
			text += fmt.Sprintf("  %d errors", failed)
		}
		return text
	})
	defer stop()
	do()
}

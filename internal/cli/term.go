package cli

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/term"
)

// color is a terminal's escape sequence.
type color string

const (
	reset  color = "\x1b[0m"
	bold   color = "\x1b[1m"
	red    color = "\x1b[31m"
	green  color = "\x1b[32m"
	yellow color = "\x1b[33m"
)

// isTerminal tells whether a person looks at w (and wants colors: no-color.org).
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd())) && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
}

// progress is one line on the terminal that says what is being waited for.
// Where there is no terminal it says nothing. Safe for concurrent use.
type progress struct {
	w    io.Writer
	stop chan struct{}
	done sync.WaitGroup

	mu   sync.Mutex
	text string
}

const (
	spinEvery = 120 * time.Millisecond
	eraseLine = "\r\x1b[K"
)

// startProgress shows text until Stop.
func (a *app) startProgress(text string) *progress {
	p := &progress{w: a.err, stop: make(chan struct{}), text: text}
	if isTerminal(a.err) {
		p.done.Go(p.spin)
	}
	return p
}

// Set changes the text.
func (p *progress) Set(text string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.text = text
}

// Stop wipes the line. It is called once.
func (p *progress) Stop() {
	close(p.stop)
	p.done.Wait()
}

func (p *progress) spin() {
	tick := time.NewTicker(spinEvery)
	defer tick.Stop()
	frames := []rune("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏")
	for i := 0; ; i++ {
		select {
		case <-p.stop:
			fmt.Fprint(p.w, eraseLine)
			return
		case <-tick.C:
			p.mu.Lock()
			fmt.Fprintf(p.w, "%s%c %s", eraseLine, frames[i%len(frames)], p.text)
			p.mu.Unlock()
		}
	}
}

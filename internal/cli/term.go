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

// isTerminal tells whether a person is at the other end of a file.
func isTerminal(f any) bool {
	file, ok := f.(*os.File)
	return ok && term.IsTerminal(int(file.Fd()))
}

// redraws tells whether what was written to w can be written over.
func redraws(w io.Writer) bool { return isTerminal(w) && os.Getenv("TERM") != "dumb" }

// isColored tells whether w shows colors, and who reads it wants them
// (no-color.org).
func isColored(w io.Writer) bool { return redraws(w) && os.Getenv("NO_COLOR") == "" }

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
	if redraws(a.err) {
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
			text := p.text
			p.mu.Unlock()
			fmt.Fprintf(p.w, "%s%c %s", eraseLine, frames[i%len(frames)], clip(text, widthOf(p.w)-2))
		}
	}
}

// widthOf is how wide a terminal is.
func widthOf(w io.Writer) int {
	if f, ok := w.(*os.File); ok {
		if width, _, err := term.GetSize(int(f.Fd())); err == nil && width > 0 {
			return width
		}
	}
	return helpWidth
}

// clip shortens a text that would go on in the next line, which can't be written
// over.
func clip(text string, width int) string {
	if r := []rune(text); len(r) >= width {
		return string(r[:max(0, width-2)]) + "…"
	}
	return text
}

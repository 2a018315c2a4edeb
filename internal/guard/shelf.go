package guard

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// shelf keeps files by their names, for daemons to come. Safe for concurrent
// use.
type shelf struct {
	mu    sync.Mutex
	files map[string]*os.File
}

// maxKept bounds how many: each is a descriptor of every daemon.
const maxKept = 4096

// keep takes a file, which it owns from then on.
func (s *shelf) keep(name string, f *os.File) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.files[name]
	switch {
	case name == "":
		return errors.Join(errors.New("what is kept needs a name"), f.Close())
	case old == nil && len(s.files) >= maxKept:
		return errors.Join(fmt.Errorf("%d files are kept already", maxKept), f.Close())
	case old != nil:
		_ = old.Close()
	}
	if s.files == nil {
		s.files = map[string]*os.File{}
	}
	s.files[name] = f
	return nil
}

// keepCopy is keep for who goes on using the file.
func (s *shelf) keepCopy(name string, f *os.File) error {
	c, err := duplicate(f)
	if err != nil {
		return err
	}
	return s.keep(name, c)
}

// take is a copy; nil if there is nothing of this name.
func (s *shelf) take(name string) *os.File {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.files[name]
	if f == nil {
		return nil
	}
	c, err := duplicate(f)
	if err != nil {
		return nil
	}
	return c
}

// duplicate copies a descriptor. It leaves the file's mode alone: File.Fd would
// make a socket block, for all who have it.
func duplicate(f *os.File) (*os.File, error) {
	var fd int
	err := withFD(f, func(old int) (err error) {
		fd, err = unix.FcntlInt(uintptr(old), unix.F_DUPFD_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("copying a descriptor: %w", err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

func withFD(f *os.File, do func(fd int) error) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var derr error
	if err := conn.Control(func(fd uintptr) { derr = do(int(fd)) }); err != nil {
		return err
	}
	return derr
}

func (s *shelf) drop(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f := s.files[name]; f != nil {
		_ = f.Close()
		delete(s.files, name)
	}
}

// all lists what is kept: the names, as JSON, and the files in their order.
func (s *shelf) all() (names string, files []*os.File) {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := slices.Sorted(maps.Keys(s.files))
	for _, name := range list {
		files = append(files, s.files[name])
	}
	encoded, _ := json.Marshal(list) // strings always can be
	return string(encoded), files
}

func (s *shelf) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.files {
		_ = f.Close()
	}
	s.files = nil
}

// fileReader reads a connection and sets aside the descriptors that come with
// it.
type fileReader struct {
	conn  *net.UnixConn
	files []*os.File
}

// maxBeside bounds how many come with one read, and how many may wait.
const maxBeside = 16

func (r *fileReader) Read(p []byte) (int, error) {
	oob := make([]byte, unix.CmsgSpace(4*maxBeside))
	n, oobn, _, _, err := r.conn.ReadMsgUnix(p, oob)
	// With an error both may be -1, which no reader may say (io.Reader).
	n = max(n, 0)
	if oobn > 0 {
		if perr := r.unpack(oob[:oobn]); perr != nil {
			return n, perr
		}
	}
	if errors.Is(err, io.EOF) {
		err = io.EOF // unwrapped, as readers want it
	}
	return n, err
}

func (r *fileReader) unpack(oob []byte) error {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return fmt.Errorf("reading descriptors: %w", err)
	}
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue // of another kind
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			r.files = append(r.files, os.NewFile(uintptr(fd), "kept"))
		}
	}
	if len(r.files) > maxBeside {
		return fmt.Errorf("%d descriptors that no request asks to keep", len(r.files))
	}
	return nil
}

// next is the descriptor that came first.
func (r *fileReader) next() (*os.File, error) {
	if len(r.files) == 0 {
		return nil, errors.New("a request to keep nothing")
	}
	f := r.files[0]
	r.files = r.files[1:]
	return f, nil
}

func (r *fileReader) close() {
	for _, f := range r.files {
		_ = f.Close()
	}
}

// writeMessage writes all of a message, with a file beside its first byte unless
// it is nil.
func writeMessage(nc *net.UnixConn, b []byte, beside *os.File) error {
	n := 0
	if beside != nil {
		err := withFD(beside, func(fd int) (err error) {
			n, _, err = nc.WriteMsgUnix(b, unix.UnixRights(fd), nil)
			return err
		})
		if err != nil {
			return err
		}
	}
	_, err := nc.Write(b[n:])
	return err
}

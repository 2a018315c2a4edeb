package cluster

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// reserveAhead is how much of the disk is kept for what etcd's file may grow by.
const reserveAhead = 16 << 20

// reserveFile has the file system keep the room that this server's etcd needs: its
// file has holes, and etcd ends the process when one can't be filled.
func (m *Member) reserveFile() error {
	if !m.runsEtcd() {
		return nil
	}
	path := filepath.Join(m.dir.etcd(), "member", "snap", "db")
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("keep room for etcd: %w", err)
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("keep room for etcd: %w", err)
	}
	if st.Blocks*512 >= st.Size+reserveAhead/2 {
		return nil
	}
	err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, st.Size+reserveAhead)
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("keep room for etcd: %w", err)
	}
	return nil
}

package daemon

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sort"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// resources is what a server has to give.
type resources struct {
	dir         string
	largestFile uint64 // 0 if it is not known
}

// findResources finds what does not change while the daemon runs.
func findResources(dir string) (resources, error) {
	largest, err := largestFile(dir)
	return resources{dir, largest}, err
}

// measure finds what this server has and what is used of it, by whomever.
// Used CPUs are not counted: they come and go by the second.
func (r resources) measure() (capacity, used *argonv1.Resources, err error) {
	meminfo, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return nil, nil, fmt.Errorf("finding out the memory: %w", err)
	}
	total, available, err := parseMeminfo(meminfo)
	if err != nil {
		return nil, nil, err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(r.dir, &st); err != nil {
		return nil, nil, fmt.Errorf("finding out the size of the disk of %s: %w", r.dir, err)
	}
	block := uint64(st.Bsize)
	// Space that the file system reserves for root counts for nobody.
	size := (st.Blocks - st.Bfree + st.Bavail) * block
	capacity = &argonv1.Resources{Cpus: uint32(runtime.NumCPU()), MemoryBytes: total, DiskBytes: size, LargestFileBytes: r.largestFile}
	used = &argonv1.Resources{MemoryBytes: total - min(total, available), DiskBytes: (st.Blocks - st.Bfree) * block}
	return capacity, used, nil
}

// largestFile finds, by trying on a file without a name, how large one can be
// in dir, in whole MiB; 0 if that can't be tried there: file systems don't say.
func largestFile(dir string) (uint64, error) {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSPC) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("finding out how large a file can be in %s: %w", dir, err)
	}
	defer func() { _ = unix.Close(fd) }()
	const mib, most = 1 << 20, 1 << 43 // in MiB: as far as file offsets go
	refused := sort.Search(most, func(n int) bool { return unix.Ftruncate(fd, int64(n)*mib) != nil })
	return uint64(max(0, refused-1)) * mib, nil
}

// parseMeminfo reads /proc/meminfo; the numbers are in bytes.
func parseMeminfo(b []byte) (total, available uint64, err error) {
	lines := bufio.NewScanner(bytes.NewReader(b))
	for lines.Scan() {
		name, rest, _ := strings.Cut(lines.Text(), ":")
		n, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 54)
		if err != nil {
			continue
		}
		switch name {
		case "MemTotal":
			total = n << 10
		case "MemAvailable":
			available = n << 10
		}
	}
	if total == 0 {
		return 0, 0, fmt.Errorf("finding out the memory: /proc/meminfo has no MemTotal")
	}
	return total, available, nil
}

// differs tells whether something has changed by more than a hundredth of what
// there is.
func differs(capacity, a, b *argonv1.Resources) bool {
	return far(capacity.GetMemoryBytes(), a.GetMemoryBytes(), b.GetMemoryBytes()) ||
		far(capacity.GetDiskBytes(), a.GetDiskBytes(), b.GetDiskBytes()) ||
		a.GetCpus() != b.GetCpus() || a.GetLargestFileBytes() != b.GetLargestFileBytes()
}

func far(whole, a, b uint64) bool {
	return max(a, b)-min(a, b) > whole/100
}

package nbd

import (
	"math/bits"
	"sync"

	"github.com/argon-cluster/argon/internal/volume"
)

// Buffers have sizes of powers of two, from a page to the largest request.
const (
	minBufferBits = 12
	maxBufferBits = 25
)

// The largest request must fit the largest buffer.
var _ = [1<<maxBufferBits - volume.MaxRequest + 1]struct{}{}

// buffers lends memory to the requests of one server and gives it back to the
// garbage collector when it is not used for a while. Safe for concurrent use.
type buffers struct {
	pools [maxBufferBits - minBufferBits + 1]sync.Pool
}

func bufferClass(n int) int {
	return max(bits.Len(uint(max(n, 1)-1)), minBufferBits) - minBufferBits
}

// bufferSize is how much memory get(n) takes.
func bufferSize(n int) int64 { return 1 << (bufferClass(n) + minBufferBits) }

// get lends a buffer with room for n bytes; what it holds is left from others.
// The pointer must come back with put.
func (b *buffers) get(n int) *[]byte {
	class := bufferClass(n)
	if p, ok := b.pools[class].Get().(*[]byte); ok {
		return p
	}
	p := make([]byte, 1<<(class+minBufferBits))
	return &p
}

func (b *buffers) put(p *[]byte) { b.pools[bufferClass(len(*p))].Put(p) }

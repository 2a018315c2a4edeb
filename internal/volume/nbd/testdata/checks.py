# Checks of the server by libnbd, for nbdsh: TestNbdsh calls the functions, each
# on a device of its own, of zeros, 4 MiB, that is served as "disk".

import errno
import nbd

SIZE = 4 << 20
MAX = 32 << 20
HOLE, ZERO = nbd.STATE_HOLE, nbd.STATE_ZERO


def connect(socket, export="disk", structured=True, contexts=True, handshake=True):
    """A handle that sends what it is told to, even if it may not."""
    h = nbd.NBD()
    h.set_strict_mode(0)
    h.set_export_name(export)
    h.set_request_structured_replies(structured)
    if contexts:
        h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    if not handshake:
        h.set_handshake_flags(0)
    h.connect_unix(socket)
    return h


def fails(what, want, *args, **kwargs):
    try:
        what(*args, **kwargs)
    except nbd.Error as e:
        assert e.errnum == want, f"{what.__name__}{args[1:]}: {e}, want {errno.errorcode[want]}"
    else:
        raise AssertionError(f"{what.__name__}{args[1:]} was carried out")


def extents(h, length, off, flags=0):
    """What block status says, one request after the other until the end."""
    found = []

    def extent(context, at, entries, err):
        assert context == "base:allocation", context
        for n, state in zip(entries[::2], entries[1::2]):
            found.append((at, n, state))
            at += n

    h.block_status(length, off, extent, flags)
    return found


def announces(socket):
    h = connect(socket)
    assert h.get_protocol() == "newstyle-fixed"
    assert h.get_structured_replies_negotiated()
    assert h.get_size() == SIZE
    assert not h.is_read_only() and not h.is_rotational()
    assert h.can_flush() and h.can_fua() and h.can_trim() and h.can_zero() and h.can_fast_zero()
    assert h.can_df() and h.can_multi_conn() and not h.can_cache()
    assert h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    assert h.get_block_size(nbd.SIZE_MINIMUM) == 512
    assert h.get_block_size(nbd.SIZE_PREFERRED) == 4096
    assert h.get_block_size(nbd.SIZE_MAXIMUM) == MAX
    assert not h.get_tls_negotiated()
    simple = connect(socket, structured=False)
    assert not simple.can_df() and not simple.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    assert simple.can_flush() and simple.can_multi_conn()


def haggles(socket):
    h = nbd.NBD()
    h.set_opt_mode(True)
    h.set_full_info(True)
    h.connect_unix(socket)
    names = []
    h.opt_list(lambda name, description: names.append(name))
    assert names == ["disk"], names
    contexts = []
    h.set_export_name("disk")
    h.add_meta_context("x-unknown:whatever")
    h.opt_list_meta_context(contexts.append)
    assert contexts == [], contexts
    h.clear_meta_contexts()
    h.opt_list_meta_context(contexts.append)
    assert contexts == ["base:allocation"], contexts
    h.add_meta_context("base:")
    h.opt_list_meta_context(contexts.append)
    assert contexts == ["base:allocation"] * 2, contexts
    h.clear_meta_contexts()
    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.set_export_name("tape")
    fails(h.opt_info, errno.ENOENT)
    fails(h.opt_go, errno.ENOENT)
    h.set_export_name("")
    h.opt_info()
    assert h.get_size() == SIZE and h.get_canonical_export_name() == "disk"
    h.opt_go()
    assert h.get_size() == SIZE and h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.pread(512, 0)
    left = nbd.NBD()
    left.set_opt_mode(True)
    left.connect_unix(socket)
    left.opt_abort()
    assert left.aio_is_closed()


def tls(socket):
    h = nbd.NBD()
    h.set_tls(nbd.TLS_ALLOW)
    h.set_uri_allow_tls(nbd.TLS_ALLOW)
    h.connect_unix(socket)
    assert not h.get_tls_negotiated()
    h.pread(512, 0)
    strict = nbd.NBD()
    strict.set_tls(nbd.TLS_REQUIRE)
    fails(strict.connect_unix, errno.ENOTSUP, socket)


def old_handshake(socket):
    for contexts in False, True:
        h = connect(socket, structured=False, contexts=contexts, handshake=False)
        assert h.get_size() == SIZE
        h.pwrite(b"old" + bytes(509), 512)
        assert h.pread(512, 512)[:3] == b"old"


def reads(socket):
    h = connect(socket)
    data = bytes(range(256)) * 4096
    h.pwrite(data, 1 << 20)
    for flags in 0, nbd.CMD_FLAG_DF:
        got, chunks = bytearray(3 << 20), []

        def chunk(data, at, status, err):
            assert status in (nbd.READ_DATA, nbd.READ_HOLE), status
            chunks.append((at, len(data)))
            got[at : at + len(data)] = data

        h.pread_structured(3 << 20, 0, chunk, flags)
        assert sum(n for _, n in chunks) == 3 << 20 and bytes(got) == bytes(1 << 20) + data + bytes(1 << 20)
        assert flags == 0 or len(chunks) == 1, chunks
    h.pread(0, 0)
    h.pread(0, SIZE)
    simple = connect(socket, structured=False)
    assert simple.pread(1 << 20, 1 << 20) == data
    simple.pread(0, 0)


def status(socket):
    h = connect(socket)
    h.pwrite(b"x" * 8192, 64 << 10)
    h.pwrite(b"x" * 4096, 72 << 10)
    hole = HOLE | ZERO
    assert extents(h, SIZE, 0) == [(0, 64 << 10, hole), (64 << 10, 12288, 0), (76 << 10, SIZE - (76 << 10), hole)]
    assert extents(h, 4096, 60 << 10, nbd.CMD_FLAG_REQ_ONE) == [(60 << 10, 4096, hole)]
    assert extents(h, 1 << 20, 60 << 10, nbd.CMD_FLAG_REQ_ONE) == [(60 << 10, 4096, hole)]
    h.zero(8192, 64 << 10)
    assert extents(h, SIZE, 0)[0] == (0, 72 << 10, hole)
    for off, length in (0, 0), (SIZE, 512), (SIZE - 512, 1024), (1, 512):
        fails(extents, errno.EINVAL, h, length, off)
    fails(extents, errno.EINVAL, h, 512, 0, nbd.CMD_FLAG_DF)
    for other in connect(socket, contexts=False), connect(socket, structured=False):
        fails(extents, errno.EINVAL, other, 512, 0)


def contexts_of_another_name(socket):
    h = nbd.NBD()
    h.set_opt_mode(True)
    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.connect_unix(socket)
    h.set_export_name("")
    h.opt_info()
    h.set_export_name("disk")
    h.opt_go()
    assert h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    assert extents(h, SIZE, 0) == [(0, SIZE, HOLE | ZERO)]


def refuses(socket):
    for structured in True, False:
        h = connect(socket, structured=structured)
        too_long = errno.EOVERFLOW if structured else errno.EINVAL
        fails(h.pread, errno.EINVAL, 1024, SIZE - 512)
        fails(h.pread, errno.EINVAL, 512, 1)
        fails(h.pread, errno.EINVAL, 511, 0)
        fails(h.pread, too_long, MAX + 512, 0)
        fails(h.pread, errno.EINVAL, 512, 0, nbd.CMD_FLAG_REQ_ONE)
        fails(h.pwrite, errno.ENOSPC, bytes(1024), SIZE - 512)
        fails(h.pwrite, errno.ENOSPC, bytes(512), 1 << 62)
        fails(h.pwrite, errno.EINVAL, bytes(511), 0)
        fails(h.pwrite, errno.EINVAL, bytes(512), 0, nbd.CMD_FLAG_DF)
        fails(h.trim, errno.EINVAL, 1024, SIZE - 512)
        fails(h.trim, errno.EINVAL, 100, 512)
        fails(h.zero, errno.ENOSPC, 1024, SIZE - 512)
        fails(h.zero, errno.EINVAL, 100, 512)
        fails(h.zero, errno.ENOTSUP, 512, 0, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE)
        fails(h.cache, errno.EINVAL, 512, 0)
        # After all that, both still understand each other.
        h.pwrite(b"y" * 512, 0)
        assert h.pread(512, 0) == b"y" * 512
        assert h.pread(512, SIZE - 512) == bytes(512)
        h.flush()


def zeroes_and_trims(socket):
    h = connect(socket)
    fua = nbd.CMD_FLAG_FUA
    for flags in 0, fua, nbd.CMD_FLAG_FAST_ZERO, nbd.CMD_FLAG_NO_HOLE, fua | nbd.CMD_FLAG_NO_HOLE:
        h.pwrite(b"x" * (2 << 20), 512, fua)
        h.zero(1 << 20, 1024, flags)
        assert h.pread(2 << 20, 512) == b"x" * 512 + bytes(1 << 20) + b"x" * ((1 << 20) - 512), flags
    for flags in 0, fua:
        h.pwrite(b"x" * 8192, 0)
        h.trim(4096, 2048, flags)
        assert h.pread(2048, 0) == b"x" * 2048 and h.pread(2048, 6144) == b"x" * 2048
    h.zero(SIZE, 0, nbd.CMD_FLAG_FAST_ZERO)
    assert h.pread(SIZE, 0) == bytes(SIZE)
    h.trim(SIZE, 0)


def many_connections(socket):
    hs = [connect(socket, structured=i % 2 == 0) for i in range(8)]
    for i, h in enumerate(hs):
        h.pwrite(bytes([i + 1]) * 4096, i * 4096)
        hs[i - 1].flush()
    for h in hs:
        assert h.pread(8 * 4096, 0) == b"".join(bytes([i + 1]) * 4096 for i in range(8))


def pipelines(socket):
    h = connect(socket)
    data = [nbd.Buffer.from_bytearray(bytearray(bytes([i % 251 + 1]) * 4096)) for i in range(1000)]
    cookies = [h.aio_pwrite(b, i * 4096) for i, b in enumerate(data)]
    back = [nbd.Buffer(4096) for _ in data]
    while cookies:
        h.poll(-1)
        cookies = [c for c in cookies if not h.aio_command_completed(c)]
    cookies = [h.aio_pread(b, i * 4096) for i, b in enumerate(back)]
    while cookies:
        h.poll(-1)
        cookies = [c for c in cookies if not h.aio_command_completed(c)]
    for a, b in zip(data, back):
        assert a.to_bytearray() == b.to_bytearray()
    h.shutdown()

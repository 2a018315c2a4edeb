package catalog

import (
	"context"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// answerTimeout bounds each request to etcd. An etcd without a majority answers
// in time that it has none; one that is frozen, or whose host lost its power,
// would otherwise hold a loop up until the connection is given up. It is longer
// than the choice of a new etcd leader takes.
const answerTimeout = 5 * time.Second

// etcd is a client whose requests are bounded by answerTimeout; watches are
// not.
type etcd struct{ *clientv3.Client }

func (e etcd) Get(ctx context.Context, key string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	return e.Client.Get(ctx, key, opts...)
}

func (e etcd) Put(ctx context.Context, key, value string, opts ...clientv3.OpOption) error {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	_, err := e.Client.Put(ctx, key, value, opts...)
	return err
}

func (e etcd) Delete(ctx context.Context, key string, opts ...clientv3.OpOption) error {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	_, err := e.Client.Delete(ctx, key, opts...)
	return err
}

// Txn does what follows if the guards hold, and otherwise reads.
func (e etcd) Txn(ctx context.Context, guards []clientv3.Cmp, then, otherwise []clientv3.Op) (*clientv3.TxnResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	return e.Client.Txn(ctx).If(guards...).Then(then...).Else(otherwise...).Commit()
}

// absent is the guard that there is no such key.
func absent(key string) clientv3.Cmp { return clientv3.Compare(clientv3.ModRevision(key), "=", 0) }

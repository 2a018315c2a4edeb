// Package cluster makes servers a cluster: it lets them in, gives them
// certificates, runs etcd on those that vote, and keeps each server's lease.
//
// What lives here: the certificate authority, tokens, init, join and admit,
// the server's identity on disk, the embedded etcd and who votes, the lease
// and the election of the leader. What must not: workloads, volumes, the
// API's handlers. Nothing here knows what a cluster is for.
//
// A server's directory, as far as this package is concerned:
//
//	server.json   who this server is; there once it is part of a cluster
//	ca.pem        the cluster's certificate authority
//	server.pem    this server's certificate
//	server.key    its private key, which never leaves the server
//	etcd/         etcd's data, on voters and learners
//	unfinished    there while init or join is at work; what they left behind
//	              is cleared away by the next one
package cluster

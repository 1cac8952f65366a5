// etcd and kube-apiserver as they are upstream, and Kubernetes' controllers with main.go for a main.  Kubernetes' own go.mod
// finds its libraries (k8s.io/api and so on) in folders of its repository; tests/deploy/go_programs.py writes the published
// ones into a copy, and `go mod tidy` the rest.
module controllers

go 1.26.0

require (
	go.etcd.io/etcd/server/v3 v3.7.0
	k8s.io/kubernetes v1.37.2
)

tool (
	go.etcd.io/etcd/server/v3
	k8s.io/kubernetes/cmd/kube-apiserver
)

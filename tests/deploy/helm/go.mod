// What else is needed, and at which version, follows from Helm's own go.mod; `go mod tidy` writes it into a copy.
module render

go 1.26.0

require helm.sh/helm/v3 v3.22.0

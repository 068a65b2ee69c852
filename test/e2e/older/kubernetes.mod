// What Kubernetes needs in build/versions.mk's OLDER_KUBERNETES_VERSION, and not in go.mod's: a part of a go.mod.
require (
	github.com/armon/circbuf v0.0.0-20190214190532-5111143e8da2 // indirect
	github.com/gregjones/httpcache v0.0.0-20190611155906-901d90724c79 // indirect
	github.com/karrick/godirwalk v1.17.0 // indirect
	github.com/libopenstorage/openstorage v1.0.0 // indirect
	github.com/mohae/deepcopy v0.0.0-20170929034955-c48cc78d4826 // indirect
)

replace (
	github.com/google/cadvisor => github.com/google/cadvisor v0.53.0
	github.com/opencontainers/cgroups => github.com/opencontainers/cgroups v0.0.3
)

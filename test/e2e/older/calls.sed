# What our code calls of Kubernetes' libraries that the older one does not have, or has under another name.
s/FieldsV1\.GetRawBytes()/FieldsV1.Raw/
s/cache\.WaitFor(ctx, "", s\.HasSyncedChecker())/cache.WaitForCacheSync(ctx.Done(), s.HasSynced)/
s/factory\.StartWithContext(ctx)/factory.Start(ctx.Done())/
# Its kubelet does not list images in a stream.
/^\/\/ StreamImages is/,/^}/d
/^\t"io"$/d

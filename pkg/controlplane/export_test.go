package controlplane

// ReconcileRoles is exported for tests that start a control plane, which cannot be in this package.
var ReconcileRoles = reconcileRoles

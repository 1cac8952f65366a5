output "role_arn" {
  description = "For AWS_ROLE_ARN of the pod (deploy/kustomize/components/sagemaker)."
  value       = aws_iam_role.worker.arn
}

output "issuer" {
  description = "Who signs the pods' tokens, as AWS knows it."
  value       = "https://${local.issuer}"
}

output "subject" {
  description = "Whose token is exchanged: the only one for which the role may be taken."
  value       = "system:serviceaccount:${var.namespace}:${var.service_account}"
}

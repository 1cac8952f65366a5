{{- /* The name of everything: the release's, so that two releases in a namespace do not meet. */ -}}
{{- define "worker.name" -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "worker.labels" -}}
app.kubernetes.io/name: {{ include "worker.name" . }}
{{- end -}}

{{- /* What budget, policy, spread and scrapers select the pods by. */ -}}
{{- define "worker.podLabels" -}}
app.kubernetes.io/name: {{ include "worker.name" . }}
app.kubernetes.io/component: worker
{{- end -}}

{{- define "batches.name" -}}
{{ include "worker.name" . }}-batches
{{- end -}}

{{- define "batches.podLabels" -}}
app.kubernetes.io/name: {{ include "worker.name" . }}
app.kubernetes.io/component: batches
{{- end -}}

{{- define "worker.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- /* A file of the chart, with the values of a section merged over it. */ -}}
{{- define "worker.merged" -}}
{{- if .config -}}
{{- mergeOverwrite (fromYaml .base) (deepCopy .config) | toYaml -}}
{{- else -}}
{{- .base -}}
{{- end -}}
{{- end -}}

{{- define "worker.config" -}}
{{- include "worker.merged" (dict "base" (.Files.Get "files/worker.yaml") "config" .Values.config) -}}
{{- end -}}

{{- define "batches.config" -}}
{{- include "worker.merged" (dict "base" (.Files.Get "files/batches.yaml") "config" .Values.batches.config) -}}
{{- end -}}

{{- /* Cloud Monitoring's count of waiting and leased messages, minutes old. */ -}}
{{- define "worker.backlogQuery" -}}
sum(max_over_time(pubsub_googleapis_com:subscription_num_undelivered_messages{monitored_resource="pubsub_subscription",subscription_id="{{ .Values.requestSubscription }}"}[5m]))
{{- end -}}

{{- /* At once up, the larger of doubling and four pods every 30 s; down slower than the metric is late (2 to 4 min). */ -}}
{{- define "worker.scalingBehavior" -}}
scaleUp:
  stabilizationWindowSeconds: 0
  selectPolicy: Max
  policies:
    - {type: Percent, value: 100, periodSeconds: 30}
    - {type: Pods, value: 4, periodSeconds: 30}
scaleDown:
  stabilizationWindowSeconds: 300
  policies:
    - {type: Percent, value: 25, periodSeconds: 120}
{{- end -}}

{{- /* What every pod that uses Google's services needs. */ -}}
{{- define "worker.commonEgress" -}}
# DNS: kube-dns, NodeLocal DNSCache (169.254.20.10), Cloud DNS (the metadata server's address).
- to:
    - namespaceSelector:
        matchLabels:
          kubernetes.io/metadata.name: kube-system
      podSelector:
        matchLabels:
          k8s-app: kube-dns
    - ipBlock:
        cidr: 169.254.20.10/32
    - ipBlock:
        cidr: 169.254.169.254/32
  ports:
    - protocol: UDP
      port: 53
    - protocol: TCP
      port: 53
# Workload identity's tokens: the metadata server, with Dataplane V2 and without.  A missing rule shows as a
# time-out of authentication (https://cloud.google.com/kubernetes-engine/docs/how-to/network-policy).
- to:
    - ipBlock:
        cidr: 169.254.169.254/32
  ports:
    - protocol: TCP
      port: 80
    - protocol: TCP
      port: 8080
- to:
    - ipBlock:
        cidr: 169.254.169.252/32
  ports:
    - protocol: TCP
      port: 987
    - protocol: TCP
      port: 988
{{- end -}}

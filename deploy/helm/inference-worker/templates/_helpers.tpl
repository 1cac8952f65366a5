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

{{- define "worker.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "worker.config" -}}
{{- $base := .Files.Get "files/worker.yaml" -}}
{{- if .Values.config -}}
{{- mergeOverwrite (fromYaml $base) (deepCopy .Values.config) | toYaml -}}
{{- else -}}
{{- $base -}}
{{- end -}}
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

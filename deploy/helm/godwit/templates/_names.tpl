{{- /* SPDX-License-Identifier: Apache-2.0 */ -}}
{{- /* Never another: the controller finds agents by it. */ -}}
{{- define "godwit.name" -}}godwit{{- end -}}

{{- /* Leaves room for what objects append: the longest is -certificates-NNNNN. */ -}}
{{- define "godwit.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "godwit.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "godwit.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- /* Labels that select: they can never change. Call with (list $ "component"). */ -}}
{{- define "godwit.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "godwit.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "godwit.labels" -}}
{{- $root := index . 0 -}}
{{ include "godwit.selector" . }}
app.kubernetes.io/part-of: godwit
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- /* The image of a component: (list $ .Values.orchestrator.image). */ -}}
{{- define "godwit.image" -}}
{{- $root := index . 0 -}}
{{- $image := index . 1 -}}
{{- with $root.Values.image.registry }}{{ . }}/{{ end -}}
{{- $image.repository -}}
{{- if $image.digest -}}@{{ $image.digest }}
{{- else -}}:{{ default $root.Chart.AppVersion $root.Values.image.tag }}
{{- end -}}
{{- end -}}

{{- define "godwit.pullSecrets" -}}
{{- with .Values.image.pullSecrets -}}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "godwit.orchestrator.name" -}}{{ include "godwit.fullname" . }}-orchestrator{{- end -}}
{{- define "godwit.node.name" -}}{{ include "godwit.fullname" . }}-node{{- end -}}
{{- define "godwit.orchestrator.account" -}}
{{- default (include "godwit.orchestrator.name" .) .Values.orchestrator.serviceAccount.name -}}
{{- end -}}
{{- define "godwit.node.account" -}}
{{- default (include "godwit.node.name" .) .Values.node.serviceAccount.name -}}
{{- end -}}

{{- define "godwit.orchestrator.host" -}}
{{ include "godwit.orchestrator.name" . }}.{{ .Release.Namespace }}.svc
{{- end -}}

{{- define "godwit.tls" -}}{{- if ne .Values.tls.mode "plaintext" }}true{{ end -}}{{- end -}}
{{- define "godwit.url" -}}
{{ if include "godwit.tls" . }}https{{ else }}http{{ end }}://{{ include "godwit.orchestrator.host" . }}:{{ .Values.orchestrator.service.restPort }}
{{- end -}}

{{- define "godwit.secret.orchestrator" -}}
{{- if eq .Values.tls.mode "existing" -}}{{ .Values.tls.existing.orchestratorSecret }}
{{- else -}}{{ include "godwit.fullname" . }}-orchestrator-tls{{- end -}}
{{- end -}}
{{- define "godwit.secret.viewer" -}}
{{- if eq .Values.tls.mode "existing" -}}{{ .Values.tls.existing.viewerSecret }}
{{- else -}}{{ include "godwit.fullname" . }}-viewer-tls{{- end -}}
{{- end -}}
{{- define "godwit.secret.nodes" -}}{{ include "godwit.fullname" . }}-nodes-tls{{- end -}}

{{- /* POD_IP, written as in HOST:PORT. */ -}}
{{- define "godwit.node.host" -}}
{{- if eq .Values.node.ipFamily "IPv6" -}}[$(POD_IP)]{{- else -}}$(POD_IP){{- end -}}
{{- end -}}

{{- /* What every container has that needs nothing special. */ -}}
{{- define "godwit.confined" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "godwit.unprivilegedPod" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

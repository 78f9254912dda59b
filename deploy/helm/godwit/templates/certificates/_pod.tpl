{{- /* SPDX-License-Identifier: Apache-2.0 */ -}}
{{- define "godwit.certificates.pod" -}}
metadata:
  labels: {{- include "godwit.labels" (list . "certificates") | nindent 4 }}
spec:
  serviceAccountName: {{ include "godwit.fullname" . }}-certificates
  automountServiceAccountToken: true
  {{- with include "godwit.pullSecrets" . }}{{ . | nindent 2 }}{{ end }}
  restartPolicy: OnFailure
  enableServiceLinks: false
  nodeSelector: {{- toYaml .Values.orchestrator.nodeSelector | nindent 4 }}
  {{- with .Values.orchestrator.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext: {{- include "godwit.unprivilegedPod" . | nindent 4 }}
  containers:
    - name: certificates
      image: {{ include "godwit.image" (list . .Values.orchestrator.image) }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      command: [godwit, certs, cluster]
      args:
        - --namespace={{ .Release.Namespace }}
        - --authority-secret={{ include "godwit.fullname" . }}-authority
        - --orchestrator-secret={{ include "godwit.secret.orchestrator" . }}
        - --viewer-secret={{ include "godwit.secret.viewer" . }}
        - --nodes-secret={{ include "godwit.secret.nodes" . }}
        - --address={{ include "godwit.orchestrator.host" . }}
        - --address={{ include "godwit.orchestrator.host" . }}.{{ .Values.clusterDomain }}
        - --days={{ .Values.tls.selfSigned.days }}
        - --authority-days={{ .Values.tls.selfSigned.authorityDays }}
        {{- range $label, $value := .Values.node.nodeSelector }}
        - --node-label={{ $label }}={{ $value }}
        {{- end }}
        {{- if and .Values.orchestrator.evictionWebhook.enabled (not .Values.orchestrator.evictionWebhook.caBundle) }}
        - --webhook={{ include "godwit.fullname" . }}-eviction
        {{- end }}
      resources:
        requests: {cpu: 10m, memory: 96Mi}
        limits: {memory: 256Mi}
      securityContext: {{- include "godwit.confined" . | nindent 8 }}
{{- end -}}
